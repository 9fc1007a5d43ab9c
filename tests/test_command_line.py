"""The real commands, as a user types them: runs, sweeps, kills, mistakes, and what they leave behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT, command, start
from wandb_file import records

pytestmark = pytest.mark.slow

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
    first = command(*SHORT, *paths, "optimizer=dsam", "optimizer.radius=0.4", cold=True)
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


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


LONG = ["train.max_steps=60", "tracking=disabled", "checkpoint.every_seconds=0.1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = command(*LONG, *STATEFUL, f"paths.runs={folder}", f"paths.cache={cache}")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*/*/*/*"))


STATEFUL = ["optimizer=dsam", "optimizer.mask=fresh"]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_and_ends_as_an_undisturbed_one(tmp_path, paths, undisturbed, signum, status):
    stopped = tmp_path / "runs"
    process = start(*LONG, *STATEFUL, *paths)
    wait_for(lambda: list(stopped.glob("*/*/*/*/checkpoint/*.pt")))
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert not results(stopped)
    assert list(stopped.glob("*/*/*/*/checkpoint/*.pt"))
    done = command(*LONG, *STATEFUL, *paths)
    assert done.returncode == 0, done.stderr
    (one,), (other,) = results(stopped).values(), [json.loads((undisturbed / "result.json").read_text())]
    assert without_clock(one) == without_clock(other)
    (folder,) = stopped.glob("*/*/*/*")
    assert log_lines(folder) == log_lines(undisturbed)
    assert not (folder / "checkpoint").exists()


def test_a_sweep_survives_a_killed_run_and_the_same_command_runs_only_what_is_missing(tmp_path, paths):
    arguments = [
        *["-m", "optimizer=adamw,sam", "seed=range(0,2)", "launcher.workers=2", "tracking=disabled"],
        "launcher.retries=0",
        *["train.max_steps=30", *paths],
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


def test_a_run_that_raises_leaves_its_traceback_in_its_log_and_the_others_finish(tmp_path, paths):
    """The second run's folder cannot hold a checkpoint: a file lies in its place."""
    arguments = [*["-m", "seed=range(0,2)", *SHORT], *paths]
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


def test_a_run_on_files_of_other_than_the_official_length_says_so(tmp_path, paths):
    for split in ("train", "dev"):
        file = tmp_path / "glue" / "RTE" / f"{split}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            "index\tsentence1\tsentence2\tlabel\n0\tA man.\tA man.\tentailment\n1\tA dog.\tA cat.\tnot_entailment\n"
        )
    for more in ([], ["-m"]):
        done = command("task=rte", "data=local", f"data.root={tmp_path}/glue", *SHORT, *paths, *more)
        assert done.returncode == 0, done.stderr
        assert "rte train: 2 rows, official 2490" in done.stdout
        shutil.rmtree(tmp_path / "runs")


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


def test_a_sweep_stopped_by_ctrl_c_leaves_checkpoints_and_goes_on(tmp_path, paths):
    arguments = [
        "-m",
        *LONG,
        "optimizer=sam",
        "seed=range(0,2)",
        "launcher.workers=2",
        *paths,
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
        "experiment=smoke",
        "seed=0",
        "launcher.plan=true",
        f"paths.runs={tmp_path}/runs",
        f"paths.cache={tmp_path}/cache",
    )
    assert done.returncode == 0, done.stderr
    assert "15 runs: 15 missing. 15 would start." in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert not (ROOT / "multirun.yaml").exists()


def test_reproduce_makes_tables_figures_and_report(tmp_path):
    """The smoke experiment on one task with one seed, shortened; `make reproduce` does all of it."""
    places = [f"paths.{p}={tmp_path}/{p}" for p in ("runs", "cache", "tables", "figures")]
    arguments = ["experiment=smoke", "task=agreement", "seed=0", "train.max_steps=8", "tracking=disabled", *places]
    done = command(*arguments, script="reproduce.py")
    assert done.returncode == 0, done.stderr
    for method in ("adamw", "adamw_2x", "sam", "asam", "dsam"):
        assert f"| {method}" in done.stdout or f"| **{method}" in done.stdout
    assert (tmp_path / "tables" / "smoke" / "main.csv").exists()
    assert (tmp_path / "tables" / "smoke" / "main.tex").exists()
    assert list((tmp_path / "figures" / "smoke").glob("*.png"))
    report = (tmp_path / "report.html").read_text()
    assert "dsam" in report
    assert "note:" not in done.stderr  # what was meant for the runs is not called idle in the tables
    written = (tmp_path / "report.html").stat().st_mtime_ns
    for more in (["--help"], ["++launcher.plan=true"]):  # which only look
        done = command(*arguments, *more, script="reproduce.py")
        assert done.returncode == 0 and (tmp_path / "report.html").stat().st_mtime_ns == written, done.stderr
    assert "http://" not in report.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("script", "given", "takes"),
    [("paper.py", [], "experiment=NAME"), ("records.py", ["pack"], "pack or unpack"), ("verify.py", [], "--rerun")],
)
def test_help_shows_what_a_script_takes_and_does_nothing(tmp_path, script, given, takes):
    done = command(*given, "--help", f"paths.runs={tmp_path}/runs", script=script)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}") and takes in done.stdout
    wrong = command(*given, "-m", f"paths.runs={tmp_path}/runs", script=script)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: unrecognized arguments: -m")


def test_settings_that_choose_no_runs_are_said_to_choose_none(tmp_path):
    done = command("experiment=smoke", "task=rte", f"paths.runs={tmp_path}", script="paper.py")
    assert done.stderr.startswith("note: all runs of smoke are meant: no effect of task=rte\nerror: no sweep 'smoke'")


@pytest.mark.parametrize("script", ["paper.py", "export_wandb.py"])
def test_runs_that_are_packed_alone_are_said_to_be(tmp_path, script):
    done = command("experiment=glue_minilm", f"paths.runs={tmp_path}/runs", script=script)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "packed in results/records/glue_minilm.zip: records.py unpack experiment=glue_minilm" in done.stderr


def test_reproduce_of_one_run_is_refused(paths):
    done = command("task=majority", *paths, script="reproduce.py")
    assert done.returncode == 2 and "add experiment=NAME or -m; train.py runs one run" in done.stderr


def test_reproduce_of_an_experiment_that_is_no_sweep_is_refused_before_it_trains(tmp_path, paths):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    file = tmp_path / "conf" / "experiment" / "single.yaml"
    file.write_text("# @package _global_\ntrain: {max_steps: 2}\n")
    given = ["--config-dir", f"{tmp_path}/conf", *paths]
    done = command(*given, "experiment=single", script="reproduce.py")
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert done.stderr.startswith("error: reproduce.py makes a sweep's tables, and experiment=single is none: add -m,")
    sweep = "hydra: {mode: MULTIRUN, sweeper: {params: {seed: 0}}}\n"
    for name in ("sweep", "mine_chosen"):  # names of which the lists of sweeps make another use
        file.with_stem(name).write_text(file.read_text() + sweep)
        done = command(*given, f"experiment={name}", script="reproduce.py")
        assert done.returncode == 2 and f"error: experiment={name} is what " in done.stderr
        assert not (tmp_path / "runs").exists()


def test_reproduce_without_a_finished_run_leaves_as_its_sweep_does(tmp_path, paths):
    """With 1 where all failed. `++` before a folder is none of its own."""
    places = [f"++paths.{p}={tmp_path}/{p}" for p in ("tables", "figures")]
    given = ["-m", "task=agreement", "train.max_steps=4", "tracking=disabled", "launcher.memory_gb=0.01"]
    done = command(*given, *(f"++{path}" for path in paths), *places, script="reproduce.py")
    assert done.returncode == 1, done.stderr
    assert re.match(r"no tables: no run of 'sweep' is finished \(1 (failed|missing)\)", done.stderr.splitlines()[-1])


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    assert {line.split()[0] for line in shown.splitlines() if re.match(r"[a-z-]+ +\S", line)} == {*targets}


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


def test_what_the_environment_says_to_wandb_renames_no_run(paths, tmp_path):
    """Every variable that wandb's settings read, but those that say who one is and where the server stands."""
    import wandb

    from dsam.runs.tracking import THEIRS

    names = {f"WANDB_{name.removeprefix('x_').upper()}" for name in wandb.Settings.model_fields}
    names |= {f"WANDB_{name.upper()}" for name in wandb.Settings.model_fields}
    names |= {"WANDB_NAME", "WANDB_NOTES", "WANDB_TAGS", "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_MODE"}
    env = {name: "other" for name in names if not THEIRS.fullmatch(name)}
    done = command("train.max_steps=2", "tracking=offline", "experiment=null", *paths, env=env)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("*/*/*/*")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    (run,) = [record.run for record in records(file) if record.WhichOneof("record_type") == "run"][:1]
    assert (run.run_id, run.project, run.display_name) == (folder.name, "dsam", "agreement-tiny-adamw-0")
    assert (run.run_group, run.job_type, run.sweep_id, run.notes, list(run.tags)) == ("", "adamw", "", "", [])
    assert "WANDB_SWEEP_ID" in done.stderr and "not used" in done.stderr


def test_a_reader_that_has_seen_enough_ends_nothing(paths, tmp_path):
    quick = ["train.max_steps=2", "train.max_length=8", "tracking=disabled"]  # of which loading prints a note
    process = start("-m", "seed=range(0,2)", *quick, *paths)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 0, errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    process = start("-m", "seed=range(2,12)", *quick, *paths, f"paths.runs={tmp_path}/stopped")
    process.stderr.readline()
    process.stdout.close()
    process.stderr.close()  # as of `2>&1 | tee log`, which Ctrl-C reaches as well
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    places = [f"paths.{place}={tmp_path / place}" for place in ("tables", "figures")]
    for script in ("paper.py", "verify.py"):
        given = ["--rerun", "0"] if script == "verify.py" else []
        process = start(*given, "experiment=sweep", *paths, *places, script=script)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 0 and not errors, (script, errors)


def test_an_experiment_in_ones_own_folder_goes_through_every_command(paths, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nexperiment: mine\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(text + "train: {max_steps: 2}\n")
    mine = ["--config-dir", str(tmp_path / "own"), "experiment=mine", *paths]
    places = [f"paths.{place}={tmp_path / place}" for place in ("tables", "figures", "records")]
    done = command(*mine, "tracking=disabled")
    assert (done.returncode, done.stdout.count("2 finished")) == (0, 1), done.stderr + done.stdout
    for script, more in (
        ("paper.py", places),
        ("verify.py", ["--rerun", "0", *places]),
        ("export_wandb.py", ["--into", str(tmp_path)]),
    ):
        done = command(*mine, *more, script=script)
        assert done.returncode == 0, done.stderr
    packed = command("pack", *mine, *places, script="records.py")
    assert packed.returncode == 0 and (tmp_path / "records" / "mine.zip").exists(), packed.stderr


def test_flags_that_look_inside_and_the_shell_s_completion_work():
    looked = command("task=rte", "--info")
    assert looked.returncode == 0 and "Config search path" in looked.stdout, looked.stderr
    installed = command("-sc", "install=bash")
    assert installed.returncode == 0 and "hydra_bash_completion" in installed.stdout, installed.stderr
    line = "python train.py optimizer=fre"
    asked = command("-sc", "query=bash", env={"COMP_LINE": line, "COMP_POINT": str(len(line))})
    assert asked.stdout.split() == ["optimizer=freelb"], asked.stderr


def test_a_benchmarks_methods_end_where_settings_begin():
    done = command("--methods", "adamw", "sam", "task=nosuch", script="benchmark.py")
    assert done.returncode == 2 and "unknown task 'nosuch'" in done.stderr


@pytest.mark.parametrize("given, told", [
    (["-m", "experiment=smoke", "model.epochs=1"], True),  # which has epochs of its own
    (["-m", "optimizer=adamw,sam", "model.rho=0.1"], False),  # one of the two takes it up
    (["-m", "optimizer=adamw,asam", "model.rho=0.1"], True),
    (["model.lr=0.1", "train.lr=0.2"], True),
    (["model.lr=0.1"], False),
    (["-m", "hydra/sweeper=optuna", "model.rho=interval(0.1,0.2)", "optimizer=adamw"], True),
    (["-m", "hydra/sweeper=optuna", "model.rho=interval(0.1,0.2)", "optimizer=sam"], False),
    (["-m", "hydra/sweeper=optuna", "model.rho=interval(0.1,0.2)", "optimizer=choice(sam,asam)"], False),
])  # fmt: skip
def test_a_default_of_the_model_that_nothing_takes_up_is_said(tmp_path, given, told):
    done = command(*given, "launcher.plan=true", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache")
    assert done.returncode == 0, done.stderr
    name = next(a for a in given if a.startswith("model.")).split("=")[0]
    assert (f"note: {name}= changes nothing here" in done.stdout) == told
