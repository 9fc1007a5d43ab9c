"""A sweep goes on whatever becomes of its runs, and says what became of them."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from conftest import ROOT, command, start

from dsam import command_line
from dsam.command_line import CONF
from dsam.config import Config, Launcher
from dsam.errors import OutOfMemory, UserError
from dsam.overrides import compose_config
from dsam.runs import run
from dsam.runs.record import Record
from dsam.sweeps import display, estimate, server
from dsam.sweeps import sweep as sweeps
from dsam.sweeps.planned import Planned
from dsam.training import device as devices
from dsam.training import model as models

pytestmark = pytest.mark.slow

FAULTS = {"before": "faults:ends_of_runs"}
QUICK = ["task=agreement", "train.max_steps=4", "tracking=disabled"]


def outcomes(folder):
    """{seed: (status, reason)} of all run folders."""
    import yaml

    found = {}
    for config in folder.glob("**/config.yaml"):
        result, failure = config.with_name("result.json"), config.with_name("failure.json")
        status = json.loads(result.read_text())["status"] if result.exists() else "failed"
        reason = json.loads(failure.read_text())["reason"] if failure.exists() else ""
        found[yaml.safe_load(config.read_text())["seed"]] = status, reason
    return found


def test_a_killed_run_a_segfault_an_exit_and_an_exception_in_one_sweep(tmp_path, paths):
    seeds = ["seed=0,101,102,103,104,1", "launcher.workers=2", "launcher.retries=0"]
    done = command("-m", *QUICK, *paths, *seeds, **FAULTS)
    assert done.returncode == 1, done.stderr
    found = outcomes(tmp_path / "runs")
    assert found[0] == found[1] == ("finished", "")
    assert found[101][1] == "killed by signal 9 (SIGKILL); out of memory?"
    assert found[102][1] == "killed by signal 11 (SIGSEGV)"
    assert found[103][1] == "left with status 7 and no result"
    assert found[104][1] == "ValueError: a loss of patience"
    assert "6 runs: 2 finished, 4 failed" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    listed = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(listed) == 4
    logs = [Path(re.search(r"log: (\S+)", line)[1]).read_text() for line in listed]
    assert any("Traceback" in log and "a loss of patience" in log for log in logs)
    assert any("Fatal Python error: Segmentation fault" in log for log in logs)


def test_a_run_that_takes_too_long_and_does_not_leave_when_asked_is_killed(tmp_path, paths):
    done = command("-m", *QUICK, *paths, "seed=105", "launcher.minutes=0.03", **FAULTS)
    assert done.returncode == 1, done.stderr
    assert outcomes(tmp_path / "runs") == {105: ("failed", "no result after launcher.minutes=0.03")}
    assert "1 run: 1 failed" in done.stdout


def test_a_killed_run_is_continued_as_often_as_retries_allows(tmp_path, paths):
    done = command("-m", *QUICK, *paths, "seed=101", **FAULTS)
    assert done.returncode == 0, done.stderr
    assert "killed by signal 9 (SIGKILL); out of memory?: agreement" in done.stderr
    assert outcomes(tmp_path / "runs") == {101: ("finished", "")}
    arguments = ["-m", *QUICK, f"paths.runs={tmp_path}/two", paths[1], "seed=101"]
    again = command(*arguments, before="faults:kills_always")
    assert again.returncode == 1
    assert again.stderr.count("it goes on from its checkpoint") == 1


def test_a_run_that_outgrows_its_memory_is_killed_and_named(tmp_path, paths):
    done = command("-m", *QUICK, *paths, "seed=106,0", "launcher.memory_gb=1.5", **FAULTS)
    assert done.returncode == 1
    found = outcomes(tmp_path / "runs")
    assert found[106][1] == "memory grew beyond launcher.memory_gb=1.5"
    assert found[0][0] == "finished"


def test_each_run_gets_a_device_of_its_own_while_it_lasts(tmp_path, paths):
    done = command("-m", *QUICK, *paths, "seed=range(0,6)", "launcher.devices=[3,5]", "device.name=cpu", **FAULTS)
    assert done.returncode == 0, done.stderr
    slots = [re.search(r"slot (\S+)", log.read_text())[1] for log in (tmp_path / "runs").glob("**/log.txt")]
    assert set(slots) == {"3", "5"}
    assert len(slots) == 6
    assert Launcher(devices=["3", "5"], per_device=2).slots == ["3", "5", "3", "5"]
    assert Launcher(workers=3).slots == [None] * 3


def beside(folder):
    """[(how many others a run found on its device, its threads)] of all runs."""
    found = [re.search(r"beside (\d+) threads (\d+)", log.read_text()) for log in folder.glob("**/log.txt")]
    return [(int(run[1]), int(run[2])) for run in found]


AUTO = ["launcher.per_device=auto", "device.name=cpu", "device.threads=null", "seed=range(0,8)"]


def test_a_device_takes_one_run_until_it_tells_how_many_fit(tmp_path, paths):
    done = command("-m", *QUICK, *paths, *AUTO, "launcher.devices=[0,1]", before="faults:three_fit")
    assert done.returncode == 0, done.stderr
    line = "were in use with one run, and there are 8 cores for 2 devices: 3 runs at once from here on"
    for device in (0, 1):
        assert f"device {device}: 3.0 of 10.0 GB {line}" in done.stderr
    assert done.stderr.count("from here on") == 2 and "tried once more" not in done.stderr
    found = beside(tmp_path / "runs")
    assert len(found) == 8 and max(others for others, _ in found) == 2
    assert sorted(threads for _, threads in found) == [1] * 6 + [4] * 2  # 8 cores for 6 runs, and for 2
    assert len(outcomes(tmp_path / "runs")) == 8


def test_a_device_that_holds_fewer_than_it_seemed_takes_fewer(tmp_path, paths):
    done = command("-m", *QUICK, *paths, *AUTO, "launcher.devices=[0]", before="faults:two_fit")
    assert done.returncode == 0, done.stderr
    assert "8 cores for 1 device: 3 runs at once from here on" in done.stderr
    again = "it is tried once more, alone on its device, and that takes 2 at once from here on"
    assert done.stderr.count(again) == done.stderr.count("tried once more") == 1
    assert "8 finished" in done.stdout
    given = command(
        *("-m", *QUICK, paths[1], f"paths.runs={tmp_path}/given", "seed=range(0,4)", "device.name=cpu"),
        *("launcher.devices=[0]", "launcher.per_device=3"),
        before="faults:two_fit",
    )
    assert given.returncode == 0 and "tried once more, alone on its device\n" in given.stderr, given.stderr
    assert "from here on" not in given.stderr


@pytest.mark.parametrize("number", ["auto", "3"])
def test_a_number_for_each_device_is_refused_without_devices(tmp_path, paths, number):
    done = command("-m", *QUICK, *paths, f"launcher.per_device={number}", "seed=0,1")
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert done.stderr.startswith(
        f"error: launcher.per_device={number} is a number of runs on each of launcher.devices"
    )
    assert done.stderr.count("\n") == 1


def test_the_longest_runs_start_first(paths):
    sweep = ["task=agreement,similarity", "optimizer=adamw,sam", "train.max_steps=3", "tracking=disabled"]
    done = command("-m", *sweep, *paths)
    assert done.returncode == 0, done.stderr
    ended = re.findall(r"\] finished: (\w+) tiny (\w+) ", done.stderr)
    assert [o for _, o in ended] == ["sam", "sam", "adamw", "adamw"]


def test_a_plan_says_how_long_it_will_take(tmp_path, paths):
    arguments = ["-m", *QUICK, *paths, "optimizer=adamw,sam", "seed=0,1"]
    nothing = command(*arguments, "launcher.plan=true")
    assert nothing.returncode == 0, nothing.stderr
    assert "4 runs: 4 missing. 4 would start." in nothing.stdout
    assert "launcher.measure=true" in nothing.stdout
    assert not (tmp_path / "runs").exists()
    measured = command(*arguments, "launcher.plan=true", "launcher.measure=true")
    assert measured.returncode == 0, measured.stderr
    assert measured.stdout.count("measured") == 4
    assert re.search(r"About 0\.0\d h of training, \d+ s on 1 worker\.", measured.stdout)
    assert not (tmp_path / "runs").exists()
    assert command(*arguments[:-2], "optimizer=adamw", "seed=0").returncode == 0
    known = command(*arguments, "launcher.plan=true")
    assert known.stdout.count("runs like it") == 1
    assert known.stdout.count("other methods' runs") == 2
    assert "4 runs: 1 finished, 3 missing. 3 would start." in known.stdout


def test_a_survey_has_one_model_in_memory_and_tries_all_precisions_and_methods(monkeypatch, paths):
    def config(*given):
        return Config.load(compose_config([*QUICK, *paths, *given], CONF))

    alive, most, tried, prepare = weakref.WeakSet(), [], [], run.prepare

    def counted(*arguments):
        most.append(len(alive))
        ready = prepare(*arguments)
        alive.add(ready.network)
        return ready

    monkeypatch.setattr(run, "prepare", counted)
    monkeypatch.setattr(models, "require_precision", lambda c, *_: tried.append(c.train.precision))
    monkeypatch.setattr(models, "require_words", lambda c, *_: tried.append(c.optimizer.name))
    given = [config(), config("task=similarity"), config("train.precision=bfloat16"), config("optimizer=freelb"),
             config("task=similarity", "optimizer=sam"), config("optimizer=sam")]  # fmt: skip
    together = sweeps._survey(given)
    assert most == [0, 0] and {"float32", "bfloat16", "freelb"} <= set(tried)
    assert together == [sweeps._survey([one])[0] for one in given]
    assert together[5] == 2 * together[0] and together[4] == 2 * together[1] != together[5]


def test_data_and_model_are_loaded_once_for_a_grid_and_again_for_another_selection(monkeypatch, paths):
    loaded, prepare = [], run.prepare
    monkeypatch.setattr(run, "prepare", lambda *given: loaded.append(given[0]) or prepare(*given))
    grid = [["optimizer=sam", f"model.rho={rho}", f"train.lr={lr}"] for rho in (0.1, 0.2) for lr in (1e-3, 1e-4)]
    given = [*grid, ["selection=heldout"]]
    sweeps._survey([Config.load(compose_config([*QUICK, *paths, *own], CONF)) for own in given])
    assert [config.selection for config in loaded] == ["dev", "heldout"]


def test_without_a_temporary_folder_there_is_one_line(monkeypatch, capsys):
    def full(**_):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(SystemExit) as left:
        command_line.start(lambda: None, ["task=agreement"])
    assert left.value.code == 2
    said = "no temporary file can be written (No usable temporary directory found in ['/tmp'])"
    assert capsys.readouterr().err == f"error: {said}: make room, or set TMPDIR=DIR\n"


def test_a_temporary_folder_too_long_for_sockets_is_one_line(tmp_path, paths):
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    done = command("-m", *QUICK, *paths, "seed=0,1", env={"TMPDIR": str(folder)}, cold=True)
    assert done.returncode == 2
    said = f"no socket can be made in {folder}, by which a sweep's processes find each other: AF_UNIX path too long"
    assert done.stderr == f"error: {said}; set TMPDIR to another folder, of a short path, such as /tmp\n"


def test_a_measurement_is_on_the_launcher_s_first_device(monkeypatch, paths):
    seen = []

    def prepare(config):
        seen.append((os.environ["CUDA_VISIBLE_DEVICES"], config.device.name))
        raise UserError("seen")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(devices, "check_devices", seen.append)
    monkeypatch.setattr(run, "prepare", prepare)
    for given in ([], ["device.name=cuda:0"], ["device.name=cpu"]):
        config = Config.load(compose_config([*QUICK, *paths, "launcher.devices=[3,2]", *given], CONF))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
        with pytest.raises(UserError, match="seen"):
            estimate._few_steps(config)
    assert seen == [["3", "2"], ("3", "cuda"), ["3", "2"], ("3", "cuda:0"), ("2,3", "cpu")]


def test_a_measurement_that_comes_to_nothing_leaves_the_plan(monkeypatch, paths, capsys):
    def planned(*given):
        return sweeps.plan([Config.load(compose_config([*QUICK, *paths, "device.threads=1", *given], CONF))])

    monkeypatch.setattr(estimate.server, "call", lambda function, *arguments: function(*arguments))
    (diverges,) = planned("optimizer=sam", "model.rho=1e30")
    estimate.measure([diverges])
    assert "nothing was measured, as the training ends early: step 1: " in capsys.readouterr().out

    def full(config):
        raise OutOfMemory("cuda is out of memory")

    monkeypatch.setattr(estimate, "_few_steps", full)
    (large,) = planned()
    estimate.measure([large])
    assert capsys.readouterr().out.endswith(f"{large.title}: cuda is out of memory\n")
    assert diverges.expected.seconds is large.expected.seconds is None


def test_a_measurement_that_is_killed_leaves_the_length_unknown(tmp_path, paths):
    plan = ["launcher.plan=true", "launcher.measure=true"]
    done = command("-m", *QUICK, *paths, "seed=101", "optimizer=adamw", *plan, env={"TMPDIR": str(tmp_path)}, **FAULTS)
    assert done.returncode == 0, done.stderr
    assert "the measurement was killed, probably for want of memory" in done.stdout
    assert "1 run: 1 missing. 1 would start." in done.stdout


@pytest.mark.parametrize(
    ("modules", "unneeded"),
    [
        ("dsam.sweeps.sweep, dsam.sweeps.choose", {"torch", "transformers", "sklearn", "scipy", "joblib"}),
        ("dsam.results.report.make, dsam.results.verify, dsam.runs.archive", {"torch", "transformers", "sklearn"}),
    ],
)
def test_what_takes_most_of_the_time_of_starting_is_imported_where_it_is_used(modules, unneeded):
    code = f"import sys, {modules}; print({unneeded} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "set()"


def test_data_and_models_too_large_to_load_are_a_mistake_in_one_line(paths):
    done = command("-m", *QUICK, *paths, "seed=0,1", before="faults:kills_loading")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "loading the data and models was killed, probably for want of memory" in done.stderr


def begun(*arguments, until, **options):
    """A sweep in a group of its own, once `until` (of what it printed) is true."""
    sweep = start("-m", *arguments, session=True, unbuffered=True, **options)
    said = sweep.stdout.readline()
    deadline = time.monotonic() + 120
    while not until(said):
        assert time.monotonic() < deadline and sweep.poll() is None, said
        time.sleep(0.05)
    return sweep


def assert_ends(sweep):
    """No process of its group is left, soon."""
    deadline = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(sweep.pid, 0)
            time.sleep(0.05)


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("loading", [True, False])
def test_ctrl_c_while_data_and_models_are_loaded_is_one_line_at_once(paths, group, loading):
    arguments = [*QUICK, *paths, "seed=0,1"]
    sweep = begun(*arguments, until=lambda said: "2 runs: 2 missing" in said, before="faults:loading_takes_long")
    if loading:
        assert sweep.stdout.readline() == "loading\n"
    (os.killpg if group else os.kill)(sweep.pid, signal.SIGINT)
    _, stderr = sweep.communicate(timeout=60)
    assert (sweep.returncode, stderr) == (130, "stopped\n")
    assert_ends(sweep)


def test_a_sweep_that_is_killed_takes_its_runs_with_it_and_they_leave_checkpoints(tmp_path, paths):
    arguments = ["task=agreement", "tracking=disabled", "train.epochs=500", *paths, "seed=0,1", "launcher.workers=2"]
    logs = lambda _: len(list((tmp_path / "runs").glob("**/metrics.jsonl"))) == 2  # noqa: E731
    sweep = begun(*arguments, until=logs)
    sweep.kill()
    sweep.communicate()
    assert_ends(sweep)
    assert len(list((tmp_path / "runs").glob("**/checkpoint/*"))) >= 2
    assert not list((tmp_path / "runs").glob("**/lease.json"))


def test_a_signal_to_the_whole_group_stops_a_sweep_and_fails_no_run(tmp_path, paths):
    """As `timeout` and schedulers send it: the process that runs are forked from goes, too, and nobody knows how the
    runs ended."""
    arguments = ["task=agreement", "tracking=disabled", "train.epochs=500", *paths, "seed=0,1", "launcher.workers=2"]
    logs = lambda _: len(list((tmp_path / "runs").glob("**/metrics.jsonl"))) == 2  # noqa: E731
    sweep = begun(*arguments, until=logs)
    os.killpg(sweep.pid, signal.SIGTERM)
    _, stderr = sweep.communicate(timeout=60)
    assert sweep.returncode == 143 and "failed" not in stderr, stderr
    assert stderr.endswith("stopped; the same command goes on\n")
    assert_ends(sweep)
    assert len(list((tmp_path / "runs").glob("**/checkpoint/*"))) >= 2
    assert not list((tmp_path / "runs").glob("**/failure.json"))


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_asks_reproduce_to_stop_stops_its_sweep(tmp_path, paths, signum, status):
    arguments = ["experiment=smoke", "task=agreement", "optimizer=adamw", "train.epochs=500", "seed=0", *paths]
    logs = lambda _: bool(list((tmp_path / "runs").glob("**/metrics.jsonl")))  # noqa: E731
    started = begun(*arguments, "tracking=disabled", until=logs, script="reproduce.py")
    started.send_signal(signum)
    _, stderr = started.communicate(timeout=60)
    assert started.returncode == status and stderr.endswith("stopped; the same command goes on\n"), stderr
    assert_ends(started)
    assert list((tmp_path / "runs").glob("**/checkpoint/*"))


def test_when_the_process_that_runs_are_forked_from_is_killed_they_go_on_from_another(tmp_path, paths):
    arguments = ["task=agreement", "tracking=disabled", "train.epochs=3", *paths, "seed=0,1", "launcher.workers=2"]
    logs = lambda _: len(list((tmp_path / "runs").glob("**/metrics.jsonl"))) == 2  # noqa: E731
    sweep = begun(*arguments, until=logs)
    run = json.loads(next((tmp_path / "runs").glob("**/provenance.json")).read_text())["pid"]
    forked_from = int(Path(f"/proc/{run}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(forked_from, signal.SIGKILL)
    stdout, stderr = sweep.communicate(timeout=240)
    assert sweep.returncode == 0, stderr
    assert "2 runs: 2 finished" in stdout


def test_a_server_that_was_killed_and_is_not_yet_gone_is_replaced():
    """Its sockets close before its parent can know its end, which takes a while for a process of this size."""
    answers, _ = warm.call("faults:calls_between_kills", 3)
    assert answers == [1, 2, 3, 4]


def test_runs_that_no_process_can_be_forked_for_have_failed_in_a_line_each(paths):
    done = command("-m", *QUICK, *paths, "seed=0,1", before="faults:kills_servers")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("the process that others are forked from is killed again and again") == 4
    assert "2 runs: 2 failed" in done.stdout


def test_what_a_process_of_the_server_raises_comes_back():
    answers, said = warm.call("faults:answers_of_the_server")
    assert answers[:2] == [[2, 1], "UserError: no such thing"]
    assert answers[2].startswith("Stopped: stopped by SIGTERM")
    assert re.match("RuntimeError: Odd.*cannot be sent", answers[3])
    assert answers[4].startswith("Killed: _exit was killed")
    process = warm.Command("faults:says_in_passing", [], ROOT, os.environ)
    assert process.communicate(timeout=60) == ("said in passing\n", "")


def test_a_paper_sweep_wants_committed_code(tmp_path, paths, monkeypatch):
    arguments = ["-m", *QUICK, *paths, "launcher.require_clean=true"]
    refused = command(*arguments, before="faults:code_differs")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: files differ from the last commit, or are new")
    assert not (tmp_path / "runs").exists()
    assert command(*arguments, "launcher.plan=true", before="faults:code_differs").returncode == 0

    monkeypatch.setattr("dsam.runs.provenance.git", lambda: {"commit": "0" * 40, "dirty": True})
    wanted, unwanted = (
        Config.load(compose_config([f"launcher.require_clean={value}"], CONF)) for value in ("true", "false")
    )
    sweeps.require_clean([unwanted])
    with pytest.raises(UserError, match="files differ"):
        sweeps.require_clean([unwanted, wanted])


def test_two_sweeps_at_once_share_the_runs_and_do_none_twice(tmp_path, paths):
    arguments = ["-m", *paths, "task=agreement", "tracking=disabled"]
    arguments += ["seed=range(0,5)", "train.max_steps=30", "checkpoint.every_seconds=1"]
    both = [start(*arguments, **FAULTS) for _ in range(2)]
    ended = [one.communicate(timeout=280) for one in both]
    assert [one.returncode for one in both] == [0, 0], ended
    logs = [log.read_text() for log in (tmp_path / "runs").glob("**/log.txt")]
    assert len(logs) == 5
    assert all(log.count("slot ") == 1 for log in logs)  # started training once
    assert all("5 finished" in out for out, _ in ended)


def test_runs_start_at_once_since_the_process_that_they_are_forked_from_has_imported_all_that_takes_long():
    known = server.call(eval, "list(__import__('sys').modules)")
    assert {"torch", "transformers", "sklearn.metrics", "scipy.stats", "wandb", "dsam.runs.run"} <= set(known)


def test_a_run_s_provenance_is_of_the_code_that_its_process_was_forked_with():
    """Both were looked up once, before there was a run: a commit meanwhile changes nothing of what runs."""
    module = "__import__('dsam.runs.provenance', fromlist=['git'])"
    assert server.call(eval, f"[f.cache_info().currsize for f in ({module}.git, {module}.source_digest)]") == [1, 1]


def test_a_lone_run_that_is_being_worked_on_is_refused(tmp_path, paths):
    from dsam.runs.lease import Lease

    planned = command("-m", *QUICK, *paths, "seed=0", "launcher.plan=true")
    folder = next(Path(word) for word in planned.stdout.split() if word.startswith(str(tmp_path)))
    with Lease(folder):
        done = command(*QUICK, *paths, "seed=0")
        assert done.returncode == 2
        assert re.fullmatch(rf"error: {folder} is being worked on by process {os.getpid()} on .*\n", done.stderr)
        plan = command("-m", *QUICK, *paths, "seed=0", "launcher.plan=true")
        assert "1 run: 1 running elsewhere" in plan.stdout


def test_durations_are_taken_by_a_clock_that_does_not_jump():
    for source in (ROOT / "dsam").rglob("*.py"):
        aged_by_file_times = source.name == "lease.py"  # in a folder that nothing can be written to
        assert source.read_text().count("time.time(") == aged_by_file_times, source


def test_the_time_left_counts_what_running_runs_have_behind_them(monkeypatch, capsys):
    """Four runs of 40 s, two of 20 s, two slots. A failed one, or one that ended elsewhere, has no pace; of one that
    went on from a checkpoint all of it counts."""
    clock = 1000.0
    monkeypatch.setattr(display.time, "monotonic", lambda: clock)

    class Run(Planned):
        title, record = "", None

    runs = [Run(None, None, cost=cost) for cost in (2, 2, 2, 2, 1, 1)]
    shown = display.Display(runs)

    def start(*some):
        for r in some:
            r.status, r.started = "running", clock
        shown.show()

    def end(r, status, seconds, trained=0):
        r.status, r.seconds = status, seconds
        result = {"best": None, "train": {"seconds": trained}} if status == "finished" else None
        r.record = SimpleNamespace(result=lambda: result)
        shown.ended(r)
        return capsys.readouterr().err.strip().rsplit("; ", 1)[-1]

    start(runs[0], runs[1])
    clock += 40
    assert end(runs[0], "finished", 40) == "about 60 s left"  # 40 + 40 + 20 + 20 on two; 1 is about to end
    assert end(runs[1], "finished", 10, trained=40) == "about 60 s left"
    start(runs[2], runs[3])
    clock += 10
    assert end(runs[2], "failed", 10) == "about 35 s left"  # 30 of 3, 20 + 20
    start(runs[4])
    clock += 4
    assert end(runs[5], "finished", 0) == "about 26 s left"  # 3 alone has that before it
    clock += 30  # slower than those before: 114 s for 5 units, and 3 has 44 s of its two behind it
    assert end(runs[4], "finished", 34) == "about 2 s left"


@pytest.mark.parametrize("refused, added", [
    (OSError(28, "No space left on device"), "; nothing can be written to its folder: No space left on device"),
    (FileNotFoundError(2, "No such file or directory"), ""),  # it never began
])  # fmt: skip
def test_a_run_that_can_leave_no_reason_is_said_to_lie_where_nothing_can_be_written(paths, monkeypatch, refused, added):
    (one,) = sweeps.plan([Config.load(compose_config([*QUICK, *paths], CONF))])

    def write(*given):
        raise refused

    monkeypatch.setattr(Record, "write", write)
    sweeps._fail(one, "left with status 1 and no result")
    assert (one.status, one.reason) == ("failed", f"left with status 1 and no result{added}")


def test_a_finished_run_without_a_score_is_a_line_like_others(paths, capsys, monkeypatch):
    (one,) = sweeps.plan([Config.load(compose_config([*QUICK, *paths], CONF))])
    one.status, one.seconds = "finished", 1.0
    result = {"best": {"score": None}, "metric": "f1", "train": {"seconds": 1.0}}
    monkeypatch.setattr(Record, "result", lambda *_, **__: result)
    display.Display([one]).ended(one)
    assert "finished: " in capsys.readouterr().err


def test_memory_is_learnt_from_runs_that_trained_here_alone(paths):
    """One that is finished and comes for its weights hands back what another machine, or company, needed."""
    (one,) = sweeps.plan([Config.load(compose_config([*QUICK, *paths], CONF))])
    result = {"status": "finished", "train": {"device_memory_bytes": {"0": 78}}}
    one.outcome, one.started = lambda **_: result, time.monotonic()
    for trains, learnt in ((True, {"0": 78}), (False, None)):
        running = sweeps._Running(SimpleNamespace(exitcode=0), one, None, trains)
        sweeps._conclude(running)
        assert running.memory == learnt


def test_a_sweep_says_that_nobody_is_logged_in(paths, capsys, monkeypatch):
    def connect(mode):
        raise UserError("no login to W&B: run `wandb login`")

    monkeypatch.setattr("dsam.runs.tracking.connect", connect)
    config = Config.load(compose_config([*QUICK, *paths, "tracking.mode=online"], CONF))
    sweeps._survey([config])
    assert "note: no login to W&B: run `wandb login`; the runs go without W&B" in capsys.readouterr().out
