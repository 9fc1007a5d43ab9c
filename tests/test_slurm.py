"""`launcher=slurm` on a real Slurm of one node, which `tests/slurm/start.sh` installs and starts."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, command, start
from joblib.externals import loky

from dsam.command_line import CONF
from dsam.config import Config, Launcher
from dsam.errors import UserError
from dsam.overrides import compose_config
from dsam.runs.record import Record
from dsam.sweeps import slurm, sweep

pytestmark = pytest.mark.slow

SHORT = ["-m", "launcher=slurm", "task=agreement", "tracking=disabled", "train.max_steps=4"]
LONG = ["-m", "task=agreement", "tracking=disabled", "checkpoint.every_seconds=0.2", "train.epochs=5"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which Slurm's commands find a Slurm of this module's own."""
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.Popen([ROOT / "tests/slurm/start.sh", folder], stdout=subprocess.PIPE, text=True)
    said = started.stdout.readline()
    if said.strip() != "ready":
        said += started.stdout.read()
        if started.wait() == 77:
            pytest.skip(said.strip())
        raise RuntimeError(said)
    yield {"SLURM_CONF": f"{folder}/slurm.conf"}
    started.terminate()
    started.wait(timeout=60)


def ask(cluster, *words):
    return subprocess.run(words, env=os.environ | cluster, capture_output=True, text=True, check=True).stdout


def until(condition, what, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} after {seconds} s"
        time.sleep(0.2)


def digests(folder):
    """{run: sha256 of its weights}"""
    return {path.parent.name: json.loads(path.read_text())["weights_sha256"] for path in folder.glob("**/result.json")}


def test_an_array_of_packs_and_a_run_that_fails(cluster, tmp_path, paths):
    arguments = [*SHORT, *paths, "launcher.pack=2", "launcher.partition=low", "seed=0,1,2"]
    local = ["-m", *SHORT[2:], *paths, "seed=0,1,2", "launcher.plan=true"]
    last = [Path(word) for word in command(*local).stdout.split() if word.startswith(f"{tmp_path}/runs")][-1]
    last.mkdir(parents=True)
    (last / "checkpoint").write_text("in the way")
    done = command(*arguments, env=cluster)
    assert done.returncode == 1, done.stderr
    array = re.search(r"3 runs in 2 jobs: Slurm array (\d+)", done.stdout)[1]
    assert "3 runs: 2 finished, 1 failed" in done.stdout
    assert re.search(rf"failed: .* seed 2 \[{last.name}\]: .*; log: {last}", done.stderr)
    assert ask(cluster, "scontrol", "show", "job", array).count("JobState=COMPLETED") == 2
    assert sorted(map(len, json.loads((tmp_path / f"runs/.slurm/{array}.json").read_text()).values())) == [1, 2]
    # The very folders of a local sweep: it finds nothing to do but what failed. So does the same command.
    assert "3 runs: 2 finished, 1 failed. 1 would start." in command(*local).stdout
    again = command(*arguments, "launcher.wait=false", "launcher.sbatch=[--hold]", env=cluster)
    assert again.returncode == 0, again.stderr
    assert "1 run in 1 job" in again.stdout
    ask(cluster, "scancel", "--name=dsam")


def test_a_preempted_job_is_requeued_and_its_runs_end_as_undisturbed_ones(cluster, tmp_path, paths):
    arguments = [*LONG, "seed=0,1", paths[1]]
    sweep = ["launcher=slurm", "launcher.pack=2", "launcher.partition=low", f"launcher.cpus={os.cpu_count()}"]
    process = start(*arguments, *sweep, paths[0], env=cluster)
    until(lambda: list(tmp_path.glob("runs/**/provenance.json")), "run")
    ask(cluster, "sbatch", "--partition=high", "--output=/dev/null", "--wrap=sleep 1")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    job = re.search(r"Slurm array (\d+)", out)[1]
    assert "Restarts=1" in ask(cluster, "scontrol", "show", "job", job)
    assert "DUE TO PREEMPTION" in (tmp_path / f"runs/.slurm/{job}_0_log.err").read_text()
    undisturbed = command(*arguments, f"paths.runs={tmp_path}/local")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert digests(tmp_path / "runs") == digests(tmp_path / "local")
    assert len(digests(tmp_path / "runs")) == 2


def test_a_job_short_of_time_asks_to_be_requeued_and_the_same_command_finds_it(cluster, tmp_path, paths):
    arguments = [*LONG, *paths, "launcher=slurm", "launcher.partition=low", "seed=2"]
    left = command(*arguments, "launcher.wait=false", env=cluster)
    assert left.returncode == 0, left.stderr
    job = re.search(r"Slurm array (\d+)", left.stdout)[1]
    assert f"`scancel {job}` cancels them" in left.stdout
    until(lambda: list(tmp_path.glob("runs/**/checkpoint/*")), "checkpoint")
    # What is requeued waits until a second command has come to wait for it.
    ask(cluster, "scontrol", "update", "PartitionName=low", "State=DOWN")
    ask(cluster, "scancel", "--signal=TERM", job)  # what Slurm does launcher.warning_seconds before the end
    until(lambda: "Restarts=1" in ask(cluster, "scontrol", "show", "job", job), "requeueing")
    until(lambda: ask(cluster, "squeue", "--noheader", "--format=%T", f"--jobs={job}") == "PENDING\n", "queue")
    waits = start(*arguments, env=cluster)
    assert "jobs: 1 pending" in waits.stderr.readline()
    ask(cluster, "scontrol", "update", "PartitionName=low", "State=UP")
    waits.send_signal(signal.SIGINT)
    out, err = waits.communicate(timeout=60)
    assert waits.returncode == 130
    assert "in jobs already: 1 run" in out
    assert f"the jobs go on: the same command waits for them, `scancel {job}` cancels them" in err
    found = command(*arguments, env=cluster)
    assert found.returncode == 0, found.stderr
    assert "1 run: 1 finished" in found.stdout
    assert len(list(tmp_path.glob("runs/.slurm/*.json"))) == 1  # no second job


def test_a_cancelled_job_is_reported(cluster, paths):
    process = start(*SHORT, *paths, "seed=0", 'launcher.sbatch=["--begin=now+1hour"]', env=cluster)
    assert "jobs: 1 pending" in process.stderr.readline()
    ask(cluster, "scancel", "--name=dsam")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"failed: agreement .*: Slurm job \d+ ended as CANCELLED without its result", err)


def test_what_slurm_refuses_is_one_line(cluster, paths):
    done = command(*SHORT, *paths, "launcher.partition=nowhere", env=cluster)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: Slurm took no job: sbatch: error: invalid partition specified: nowhere"]


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (SHORT, {"PATH": "/nowhere"}, "this machine has no Slurm"),
        (SHORT[1:], {}, "launcher=slurm takes sweeps: add -m"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, paths, arguments, environment, words):
    done = command(*arguments, *paths, env=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_slurm_that_does_not_answer_is_one_line(cluster, tmp_path, paths):
    conf = tmp_path / "slurm.conf"
    text = re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", Path(cluster["SLURM_CONF"]).read_text())
    conf.write_text(text + "MessageTimeout=2\n")
    done = command(*SHORT, *paths, env={"SLURM_CONF": str(conf)})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "squeue" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_job_shares_its_gpus_and_cpus_among_its_runs(monkeypatch):
    monkeypatch.setattr(loky, "cpu_count", lambda: 64)  # a job that is not bound to its CPUs
    launcher = Launcher(name="slurm", gpus=2, per_device=2, workers=3, pack=4)
    config = Config.load(compose_config(["device.threads=null"], CONF))
    given = {"SLURM_CPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,3"}
    with_gpus, (frozen, *_) = slurm.here(launcher, [config] * 4, given)
    assert with_gpus.slots == ["0", "3", "0", "3"]
    by_type = Launcher(name="slurm", sbatch=["--gres=gpu:a100:2"], workers=2, pack=2)
    assert slurm.here(by_type, [config] * 2, given)[0].slots == ["0", "3"]
    assert frozen.device.threads == 2
    without, (frozen, *_) = slurm.here(Launcher(name="slurm", workers=3, pack=3), [config] * 3, given)
    assert without.slots == [None] * 3
    assert frozen.device.threads == 2
    (alone,) = slurm.here(Launcher(name="slurm", workers=3), [config], given)[1]
    assert alone.device.threads == 8  # launcher.pack=1: no job has runs for the other two places
    (last,) = slurm.here(Launcher(name="slurm", workers=4, pack=4), [config], given)[1]
    assert last.device.threads == 2  # as many as those of the other jobs, whose numbers it shares
    monkeypatch.setattr(loky, "cpu_count", lambda: 4)  # one that is bound to fewer than it has on the node
    (bound,) = slurm.here(Launcher(name="slurm", workers=2, pack=2), [config], given)[1]
    assert bound.device.threads == 2
    config = Config.load(compose_config(["device.threads=1"], CONF))
    assert slurm.here(launcher, [config], given)[1][0].device.threads == 1


def test_a_job_that_is_warned_asks_for_itself_alone_until_it_is_answered(monkeypatch, capsys):
    """The last job of an array has the array's number, which is also the name of all of its jobs."""
    asked, states = [], iter([None, "RUNNING\n", None, "RUNNING\n", "", "PREEMPTED\n"])

    def output(*command):
        asked.append((command[0], command[-1]))
        said = next(states)
        if said is None:
            raise UserError("squeue: Socket timed out on send/recv operation")
        return said

    monkeypatch.setattr(slurm, "_output", output)
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    given = {"SLURM_JOB_ID": "36", "SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": "2"}
    slurm._requeue(given)
    looks, requeues = ("squeue", "--jobs=36_2"), ("scontrol", "36_2")
    assert asked == [looks, looks, requeues, looks, requeues]
    asked.clear()
    slurm._requeue({"SLURM_JOB_ID": "36"})  # preempted, so that Slurm requeues it
    assert asked == [("squeue", "--jobs=36")]
    states = iter([None] * 2)
    monkeypatch.setattr(slurm, "REQUEUEING", -1.0)
    capsys.readouterr()
    slurm._requeue(given)
    assert (
        capsys.readouterr().out == "job 36_2 could not be requeued: squeue: Socket timed out on send/recv operation\n"
    )


def test_a_job_with_more_gpus_than_runs_is_refused_and_a_plan_counts_the_places_of_all_jobs(paths):
    plan = ["-m", "launcher=slurm", "task=agreement", "seed=range(0,8)", "launcher.plan=true", *paths]
    for given, said in (
        (["launcher.gpus=4"], "launcher.gpus=4 and launcher.per_device=1 have room for 4 runs at once in each job, and "
                              "launcher.pack=1 gives it fewer: say launcher.pack=4 or more"),
        (["launcher.gpus=1", "launcher.per_device=2"], "launcher.gpus=1 and launcher.per_device=2 have room for 2 runs "
                              "at once in each job, and launcher.pack=1 gives it fewer: say launcher.pack=2 or more"),
    ):  # fmt: skip
        done = command(*plan, *given)
        assert (done.returncode, done.stderr) == (2, f"error: {said}\n")
    for given, runs, places in (
        ({}, 8, 8),
        ({"gpus": 2, "pack": 4}, 8, 4),
        ({"jobs_at_once": 3}, 8, 3),
        ({"workers": 4}, 8, 8),  # a run a job
        ({"workers": 2, "pack": 3, "jobs_at_once": 2}, 9, 4),
    ):
        assert Launcher(name="slurm", **given).at_once(runs) == places
    assert Launcher(workers=4).at_once(8) == 4
    assert not slurm.asks_for_gpu(Launcher(name="slurm", sbatch=["--qos=low"]))
    assert slurm.asks_for_gpu(Launcher(name="slurm", sbatch=["--gres=gpu:1"]))


def test_a_controller_that_does_not_answer_at_first_ends_no_job(paths, tmp_path, monkeypatch):
    """Nobody knows yet what became of the jobs: that is not that they ended without a result."""
    (one,) = sweep.plan([Config.load(compose_config(["launcher=slurm", "task=agreement", *paths], CONF))])
    polls = []

    def queue():
        polls.append(1)
        raise UserError("squeue: Unable to contact slurm controller")

    result = {"status": "finished", "train": {"seconds": 1.0}, "best": None, "metric": "accuracy"}
    one.outcome = lambda **_: result if len(polls) > 3 else None
    monkeypatch.setattr(Record, "result", lambda *_, **__: result)
    for name, value in (("queue", queue), ("LATE", -1.0), ("SLOWEST", 0.0)):
        monkeypatch.setattr(slurm, name, value)
    slurm.wait([one], {one.identity.id: "7_0"}, tmp_path)
    assert (one.status, one.reason, len(polls)) == ("finished", "", 4)
