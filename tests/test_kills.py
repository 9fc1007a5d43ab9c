"""A run that is killed again and again, wherever it may be, ends as an undisturbed one: weights, result and log."""

import os
import signal
import time

import pytest
import warm
from conftest import ROOT
from test_command_line import log_lines, without_clock

from dsam.command_line import CONF
from dsam.config import Config
from dsam.overrides import compose_config
from dsam.runs.identity import identify
from dsam.runs.record import Record

pytestmark = pytest.mark.slow

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
# Methods with state between steps, or random draws of their own. The first dies at all of those places; that what each
# method keeps between steps is in the checkpoint, two kills show.
METHODS = {
    "dsam": ["optimizer.mask=fresh"],
    "looksam": ["optimizer.k=3"],
    "msam": [],
    "ae_sam": [],
    "per_instance": [],
}


def configuration(folder, cache, method, options, every_seconds=0):
    return Config.load(
        compose_config(
            [
                *("tracking=disabled", "train.max_steps=14", f"optimizer={method}", *options),
                *(f"checkpoint.every_seconds={every_seconds}", "device.threads=1"),  # 0: after every step
                *(f"paths.runs={folder}", f"paths.cache={cache}"),
            ],
            CONF,
        )
    )


def start(config, where="", n=0):
    """A run's process, which dies of SIGKILL at its n-th passage of `where`."""
    return warm.Command("faults:run_that_dies", [config.to_dict(), where, n], ROOT, os.environ)


@pytest.mark.parametrize(("method", "options"), METHODS.items())
def test_killed_at_every_kind_of_place(tmp_path, cache, method, options):
    killed, undisturbed = (
        configuration(tmp_path / place, cache, method, options) for place in ("killed", "undisturbed")
    )
    points = POINTS if method == "dsam" else [("step", 5), ("save", 3)]
    for where, n in points:
        assert start(killed, where, n).wait() == -signal.SIGKILL, where
    for delay in (0.1, 0.3) if method == "dsam" else ():  # and whenever it happens to come
        process = start(killed)
        time.sleep(delay)
        process.kill()
        process.wait()
    for config in (killed, undisturbed):
        assert start(config).wait() == 0
    one, other = identify(killed).folder, identify(undisturbed).folder
    result = Record(one).result()
    assert without_clock(result) == without_clock(Record(other).result())
    assert len(result["weights_sha256"]) == 64
    assert log_lines(one) == log_lines(other)
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}


@pytest.mark.parametrize(("method", "options"), [("looksam", ["optimizer.k=3"]), ("per_instance", [])])
def test_killed_while_a_checkpoint_is_written_beside_the_training(tmp_path, cache, method, options):
    killed, undisturbed = (
        configuration(tmp_path / place, cache, method, options, every)
        for place, every in (("killed", 1e-9), ("undisturbed", 1000))
    )
    folder = identify(killed).folder
    for where, n, left in (("save", 2, 1), ("beside", 2, 1), ("fsync", 4, 1), ("beside", 1, 1)):
        assert start(killed, where, n).wait() == -signal.SIGKILL, where
        files = [f.name for f in (folder / "checkpoint").iterdir()]
        assert sum(name.startswith(".writing.") for name in files) == left, (where, files)
        assert any(name.endswith(".pt") for name in files)
    for config in (killed, undisturbed):
        assert start(config).wait() == 0
    other = identify(undisturbed).folder
    assert without_clock(Record(folder).result()) == without_clock(Record(other).result())
    assert log_lines(folder) == log_lines(other)
    assert {p.name for p in folder.iterdir()} == {p.name for p in other.iterdir()}


def test_a_kill_between_result_and_clearing_up_leaves_a_finished_run(tmp_path, cache):
    config = configuration(tmp_path / "runs", cache, "adamw", [])
    process = start(config)
    folder = identify(config).folder
    while not (folder / "result.json").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert Record(folder).result()["status"] == "finished"
    assert start(config, "step", 1).wait() == 0  # would die if it trained
