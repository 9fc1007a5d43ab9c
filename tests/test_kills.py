"""A run that is killed again and again, wherever it may be, ends as an undisturbed one: weights, result and log."""

import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from test_command_line import log_lines, without_clock

from dsam.command_line import CONF
from dsam.config import Config
from dsam.overrides import compose_config
from dsam.runs.identity import identify
from dsam.runs.record import Record

# Where to die, and at which passage there: each attempt gets one further than the one before.
POINTS = [
    ("step", 2),
    ("save", 2),
    ("rename", 4),
    ("log", 1),
    ("fsync", 6),
    ("evaluate", 1),
    ("step", 1),
    ("result", 1),
]
# Methods with state between steps, or random draws of their own.
METHODS = {
    "dsam": ["optimizer.mask=fresh"],
    "looksam": ["optimizer.k=3"],
    "msam": [],
    "ae_sam": [],
    "per_instance": [],
}


def configuration(folder, method, options):
    return Config.load(
        compose_config(
            [
                *("tracking=disabled", "train.max_steps=14", f"optimizer={method}", *options),
                *("checkpoint.every_seconds=0", "device.threads=1"),  # a checkpoint after every step
                *(f"paths.runs={folder}", f"paths.cache={folder.parent}/cache"),
            ],
            CONF,
        )
    )


def attempt(config, point):
    """A run's process. It dies of SIGKILL at its n-th passage of `point`, in the middle of what is done there."""
    import torch

    import dsam.runs.record as record
    import dsam.runs.run as run
    import dsam.training.loop as loop

    name, n = point or ("", 0)
    passed = 0

    def dies(where, before=lambda *a, **k: None):
        nonlocal passed
        passed += where == name
        if where == name and passed == n:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def at(where, function, *arguments, **options):
        dies(where)
        return function(*arguments, **options)

    def save(function, state, stream):
        dies("save", lambda: (stream.write(b"half a checkpoint" * 100), stream.flush()))
        return function(state, stream)

    def rename(function, self, target):
        dies("result" if Path(target).name == "result.json" else "")
        dies("rename")
        return function(self, target)

    def log(function, self, line):
        dies("log", lambda: self.metrics.open("a").write('{"event": "train", "st'))
        return function(self, line)

    torch.save = partial(save, torch.save)
    os.fsync = partial(at, "fsync", os.fsync)
    loop.compute = partial(at, "evaluate", loop.compute)
    torch.optim.AdamW.step = wrapped(partial(at, "step"), torch.optim.AdamW.step)
    Path.rename = wrapped(rename, Path.rename)
    record.Record.log = wrapped(log, record.Record.log)
    run.run(config)


def wrapped(around, function):
    def method(self, *arguments, **options):
        return around(function, self, *arguments, **options)

    method.__wrapped__ = function  # the scheduler looks at it
    return method


def start(config, point):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dsam.runs.run"])
    process = context.Process(target=attempt, args=(config, point))
    process.start()
    return process


@pytest.mark.parametrize(("method", "options"), METHODS.items())
def test_killed_at_every_kind_of_place(tmp_path, method, options):
    kills = 0
    killed, undisturbed = (configuration(tmp_path / place, method, options) for place in ("killed", "undisturbed"))
    for point in POINTS:
        process = start(killed, point)
        process.join()
        assert process.exitcode == -signal.SIGKILL, point
        kills += 1
    for delay in (0.5, 1.0):  # and whenever it happens to come
        process = start(killed, None)
        process.join(delay)
        process.kill()
        process.join()
        kills += 1
    for config in (killed, undisturbed):
        process = start(config, None)
        process.join()
        assert process.exitcode == 0
    assert kills == len(POINTS) + 2
    one, other = identify(killed).folder, identify(undisturbed).folder
    result = Record(one).result()
    assert without_clock(result) == without_clock(Record(other).result())
    assert len(result["weights_sha256"]) == 64
    assert log_lines(one) == log_lines(other)
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}


def test_a_kill_between_result_and_clearing_up_leaves_a_finished_run(tmp_path):
    config = configuration(tmp_path / "runs", "adamw", [])
    process = start(config, None)
    folder = identify(config).folder
    while not (folder / "result.json").exists() and process.is_alive():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert Record(folder).result()["status"] == "finished"
    process = start(config, ("step", 1))  # would die if it trained
    process.join()
    assert process.exitcode == 0
