"""The real commands, as a user types them: runs, sweeps, kills, mistakes, and what they leave behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, command
from wandb_file import records

SHORT = ["train.max_steps=12", "tracking=disabled"]


def results(folder):
    return {json.loads(p.read_text())["id"]: json.loads(p.read_text()) for p in folder.glob("*/*/*/*/result.json")}


def without_clock(result):
    timing = ("seconds", "seconds_per_step", "examples_per_second", "peak_memory_bytes")
    clockless = {k: v for k, v in result.items() if k != "result_sha256"}
    return clockless | {"train": {k: v for k, v in result["train"].items() if k not in timing}}


def log_lines(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_one_run_says_where_it_is_and_how_good_and_is_finished_the_second_time(paths, tmp_path):
    first = command(*SHORT, *paths, "optimizer=dsam", "optimizer.radius=0.4")
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "runs").glob("*/*/*/*")
    assert str(folder) in first.stdout
    assert "matthews_correlation" in first.stdout
    config = (folder / "config.yaml").read_text()
    assert "radius: 0.4" in config
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    again = command(*SHORT, *paths, "optimizer=dsam", "optimizer.radius=0.4")
    assert again.stdout == first.stdout
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_an_offline_wandb_run_holds_what_the_log_holds(paths, tmp_path):
    done = command("train.max_steps=30", "tracking=offline", *paths)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("*/*/*/*")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for record in records(file):
        found.setdefault(record.WhichOneof("record_type"), []).append(record)
    run = found["run"][0].run
    assert run.run_id == folder.name
    assert {"task", "optimizer", "train"} <= {u.key for u in run.config.update}
    assert found["exit"][0].exit.exit_code == 0
    losses = [
        json.loads(item.value_json)
        for r in found["history"]
        for item in r.history.item
        if (item.key or "/".join(item.nested_key)) == "loss"
    ]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses == [line["loss"] for line in log]
    summary = {
        (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
        for r in found["summary"]
        for item in r.summary.update
    }
    result = json.loads((folder / "result.json").read_text())
    assert summary["best/score"] == result["best"]["score"]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "train.py"), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


LONG = ["train.max_steps=150", "tracking=disabled", "checkpoint.every_seconds=0.1"]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_and_ends_as_an_undisturbed_one(tmp_path, signum, status):
    arguments = [*LONG, "optimizer=dsam", "optimizer.mask=fresh", f"paths.cache={tmp_path}/cache"]
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    process = start(*arguments, f"paths.runs={stopped}")
    wait_for(lambda: list(stopped.glob("*/*/*/*/checkpoint/*.pt")))
    time.sleep(0.3)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert not results(stopped)
    assert list(stopped.glob("*/*/*/*/checkpoint/*.pt"))
    for place in (stopped, undisturbed):
        done = command(*arguments, f"paths.runs={place}")
        assert done.returncode == 0, done.stderr
    (one,), (other,) = results(stopped).values(), results(undisturbed).values()
    assert without_clock(one) == without_clock(other)
    (folder,), (other_folder,) = stopped.glob("*/*/*/*"), undisturbed.glob("*/*/*/*")
    assert log_lines(folder) == log_lines(other_folder)
    assert not (folder / "checkpoint").exists()


def test_a_sweep_survives_a_killed_run_and_the_same_command_runs_only_what_is_missing(tmp_path):
    arguments = [
        *["-m", "optimizer=adamw,sam", "seed=range(0,2)", "launcher.workers=2", "tracking=disabled"],
        "launcher.retries=0",
        *["train.max_steps=60", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"],
    ]
    process = start(*arguments)
    wait_for(lambda: list((tmp_path / "runs").glob("*/*/sam/*/provenance.json")), 120)
    (victim, *_) = (tmp_path / "runs").glob("*/*/sam/*/provenance.json")
    os.kill(json.loads(victim.read_text())["pid"], signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "3 finished, 1 failed" in output
    assert "killed by signal 9 (SIGKILL)" in errors
    assert str(victim.parent / "log.txt") in errors
    assert "Traceback" not in errors
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/*/*/*/result.json")}
    assert len(finished) == 3
    planned = command(*arguments, "launcher.plan=true")
    assert "4 runs: 3 finished, 1 failed. 1 would start." in planned.stdout
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert "[1/1] finished" in done.stderr
    assert len(results(tmp_path / "runs")) == 4
    assert all(p.stat().st_mtime_ns == t for p, t in finished.items())


def test_a_run_that_raises_leaves_its_traceback_in_its_log_and_the_others_finish(tmp_path):
    """The second run's folder cannot hold a checkpoint: a file lies in its place."""
    arguments = [*["-m", "seed=range(0,2)", *SHORT], f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]
    assert command(*arguments).returncode == 0
    folder = next(iter((tmp_path / "runs").glob("*/*/*/*")))
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "checkpoint").write_text("in the way")
    done = command(*arguments)
    assert done.returncode == 1
    assert "1 finished, 1 failed" in done.stdout
    assert "Traceback" not in done.stderr
    assert "Traceback" in (folder / "log.txt").read_text()


def test_a_single_run_that_fails_is_one_line_and_status_1(paths, tmp_path):
    assert command(*SHORT, *paths).returncode == 0
    (folder,) = (tmp_path / "runs").glob("*/*/*/*")
    (folder / "result.json").unlink()
    (folder / "checkpoint").write_text("in the way")
    done = command(*SHORT, *paths)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(folder / "log.txt") in done.stderr
    assert "Traceback" in (folder / "log.txt").read_text()
    (folder / "checkpoint").unlink()
    assert command(*SHORT, *paths).returncode == 0
    assert not (folder / "failure.json").exists()


def test_a_sweep_stopped_by_ctrl_c_leaves_checkpoints_and_goes_on(tmp_path):
    arguments = [
        "-m",
        *LONG,
        "optimizer=sam",
        "seed=range(0,2)",
        "launcher.workers=2",
        f"paths.runs={tmp_path}/runs",
        f"paths.cache={tmp_path}/cache",
    ]
    process = start(*arguments)
    wait_for(lambda: len(list((tmp_path / "runs").glob("*/*/*/*/checkpoint/*.pt"))) >= 2, 120)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert command(*arguments).returncode == 0
    assert len(results(tmp_path / "runs")) == 2


def test_planning_changes_nothing(tmp_path):
    done = command(
        "experiment=smoke", "launcher.plan=true", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"
    )
    assert done.returncode == 0, done.stderr
    assert "45 runs: 45 missing. 45 would start." in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert not (ROOT / "multirun.yaml").exists()


def model_folder(tmp_path, **files):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, contents in files.items():
        (folder / name.replace("__", ".")).write_text(contents)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task=agrement"], ["did you mean 'agreement'"]),
        (["optimizer=dsamm"], ["did you mean 'dsam'"]),
        (["-m", "optimizer=adamw,dsamm"], ["did you mean 'dsam'"]),
        (["-m", "optimizer=adamw,sam", "optimizer.rho=0.1"], ["rho", "plain"]),
        (["optimizer=dsam", "optimizer.weighting=gibs"], ["did you mean 'gibbs'"]),
        (["train.lrate=1"], ["train.lrate"]),
        (["optimizer=sam", "optimizer.rho=-1"], ["rho", "-1"]),
        (["-m", "optimizer=sam", "optimizer.rho=0.1,-1"], ["rho", "-1"]),
        (["train.batch_size=0"], ["train.batch_size=0"]),
        (["data=local", "task=rte"], ["data.root"]),
        (["data=local", "task=rte", "data.root=/nowhere"], ["/nowhere"]),
        (["task=rte"], ["rte", "data=local"]),
        (["model=encoder", "model.path=/nowhere"], ["/nowhere"]),
        (["paths.runs=/proc/runs"], ["/proc/runs", "paths.runs"]),
        (["device.name=cuda:99"], ["cuda:99"]),
        (["device.name=tpu3"], ["tpu3"]),
        (["train.max_length=4096"], ["4096", "128"]),
        (["model=minilm"], ["model.path"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_leaves_nothing(tmp_path, arguments, words):
    begun = time.monotonic()
    done = command(
        *arguments,
        *([] if "paths" in arguments[0] else [f"paths.runs={tmp_path}/runs"]),
        f"paths.cache={tmp_path}/cache",
        env={"HF_ENDPOINT": "http://127.0.0.1:9"},
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "runs").exists()
    assert time.monotonic() - begun < 60


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A small model folder as a user may bring one."""
    folder = tmp_path_factory.mktemp("models") / "saved"
    done = command(
        "train.max_steps=1",
        "tracking=disabled",
        "checkpoint.keep_weights=true",
        f"paths.runs={folder}",
        f"paths.cache={folder}/cache",
    )
    assert done.returncode == 0, done.stderr
    (last,) = folder.glob("*/*/*/*/last")
    return last


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), ["no weights", "model.safetensors"]),
        (lambda f: [(f / n).unlink(missing_ok=True) for n in ("tokenizer.json", "vocab.txt")], ["no tokenizer"]),
        (lambda f: (f / "config.json").unlink(), ["no configuration"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"broken"), ["weights"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer"]),
        (lambda f: edit(f / "config.json", hidden_size=32), ["do not fit"]),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), ["do not fit", "missing"]),
        (lambda f: shrink(f), ["tokenizer", "embeddings"]),
        (lambda f: edit(f / "config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="evil"), ["model"]),
    ],
)
def test_a_model_folder_that_cannot_be_used_is_one_line(tmp_path, saved_model, spoil, words):
    folder = tmp_path / "model"
    shutil.copytree(saved_model, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    spoil(folder)
    done = command(
        "model=encoder", f"model.path={folder}", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "ran").exists()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shrink(folder):
    """A model with fewer embeddings than its tokenizer has tokens."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    weights[name] = weights[name][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=100)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f.unlink(), ["train.tsv"]),
        (lambda f: f.write_text(""), ["train.tsv", "empty"]),
        (lambda f: f.write_text("index\tsentence1\tlabel\n"), ["train.tsv:1", "columns"]),
        (lambda f: f.write_text(f.read_text() + "7\ta\n"), ["train.tsv:4"]),
        (lambda f: f.write_text(f.read_text() + "7\ta\tb\tmaybe\n"), ["train.tsv:4", "maybe"]),
        (lambda f: f.write_bytes(f.read_bytes() + b"7\ta\t\xff\tentailment\n"), ["train.tsv:4", "UTF-8"]),
    ],
)
def test_a_broken_data_file_is_one_line_with_its_place(tmp_path, spoil, words):
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text(
            "index\tsentence1\tsentence2\tlabel\n0\tA man.\tA man.\tentailment\n1\tA dog.\tA cat.\tnot_entailment\n"
        )
    arguments = [
        "task=rte",
        "data=local",
        f"data.root={tmp_path}/glue",
        *SHORT,
        f"paths.runs={tmp_path}/runs",
        f"paths.cache={tmp_path}/cache",
    ]
    good = command(*arguments, "train.max_steps=1")
    assert good.returncode == 0, good.stderr
    assert "rte train: 2 rows, official 2490" in good.stdout
    shutil.rmtree(tmp_path / "runs")
    spoil(folder / "train.tsv")
    done = command(*arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "runs").exists()


def test_reproduce_makes_tables_figures_and_report(tmp_path):
    """The smoke experiment, shortened."""
    places = [f"paths.{p}={tmp_path}/{p}" for p in ("runs", "cache", "tables", "figures")]
    done = command("experiment=smoke", "train.max_steps=8", *places, script="reproduce.py", timeout=600)
    assert done.returncode == 0, done.stderr
    for method in ("adamw", "adamw_2x", "sam", "asam", "dsam"):
        assert f"| {method}" in done.stdout or f"| **{method}" in done.stdout
    assert (tmp_path / "tables" / "smoke" / "main.csv").exists()
    assert (tmp_path / "tables" / "smoke" / "main.tex").exists()
    assert list((tmp_path / "figures" / "smoke").glob("*.png"))
    report = (tmp_path / "report.html").read_text()
    assert "dsam" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    again = command("experiment=smoke", "train.max_steps=8", *places, script="paper.py")
    assert again.returncode == 0, again.stderr


def test_a_report_without_runs_says_what_to_do(tmp_path):
    done = command("experiment=smoke", f"paths.runs={tmp_path}/none", script="paper.py")
    assert done.returncode == 2
    assert "make reproduce" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    for target in ("reproduce", "plan", "paper", "verify", "test", "help", "lint", "lock", "clean"):
        assert target in shown


def test_every_method_can_be_chosen_on_the_command_line(paths):
    names = sorted(p.stem for p in (ROOT / "conf" / "optimizer").glob("*.yaml"))
    assert len(names) >= 19
    done = command("-m", f"optimizer={','.join(names)}", "launcher.plan=true", *paths)
    assert done.returncode == 0, done.stderr
    assert f"{len(names)} runs: {len(names)} missing" in done.stdout


def test_what_the_model_does_not_allow_is_found_before_any_run_starts(paths, tmp_path):
    done = command("-m", *SHORT, *paths, "optimizer=dsam", "optimizer.layers=1,9")
    assert done.returncode == 2
    assert re.fullmatch(r"error: optimizer=dsam with model=tiny: layers=9: .* has \d+\n", done.stderr)
    assert not (tmp_path / "runs").exists()
    one = command(*SHORT, *paths, "optimizer=dsam", "optimizer.layers=9")
    assert one.returncode == 2
    assert "layers=9" in one.stderr
    assert not list((tmp_path / "runs").glob("*/*/*/*/config.yaml"))
