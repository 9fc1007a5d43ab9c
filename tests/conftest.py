"""What the tests share: folders, the real command line, the real data where they lie."""

import copy
import functools
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import open_dict

from dsam import overrides

ROOT = Path(__file__).resolve().parent.parent
GLUE = ROOT.parent / "shared" / "glue"

os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Several tests run at once, and threads beyond the CPUs wait for each other by turning in a loop: runs take one each.
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["LOKY_MAX_CPU_COUNT"] = "1"

import warm  # noqa: E402


@functools.cache
def _composed(given: tuple[str, ...], conf: Path):
    return _compose(list(given), conf, with_hydra=True)


def _compose_once(given, conf, with_hydra=False, more=None):
    if more is not None:  # a folder that tests change
        return _compose(given, conf, with_hydra, more)
    config = copy.deepcopy(_composed(tuple(given), conf))
    if not with_hydra:
        with open_dict(config):
            del config["hydra"]
    return config


# Hydra takes a fifth of a second for a composition, and tests ask for thousands: in a test's own process each is made
# once. Commands compose theirs. Before any test imports it.
_compose, overrides.compose_config = overrides.compose_config, _compose_once


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # xdist's workers share it
        warm.start_server()
        if config.getoption("numprocesses", None):  # each would compile what is imported, were it not done by now
            warm.call("os:getpid")


def pytest_collection_finish():
    """What is there by now stays: each of the collections that transformers' Trainer and statsmodels ask for would go
    through the 700,000 objects of libraries and tests anew, which takes 0.4 s."""
    gc.collect()
    gc.freeze()


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background, and so in what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*arguments: str, script: str = "train.py", cold: bool = False, env: dict | None = None, **options):
    """Starts an entry point as a user does, on one thread: forked from a process that has everything imported, or
    `cold`, by a fresh interpreter. Further options are those of warm.Command."""
    script, env, options = ROOT / "experiments" / script, os.environ | (env or {}), {"cwd": ROOT} | options
    if not cold:
        return warm.Command(script, arguments, options.pop("cwd"), env, **options)
    env = {name: value for name, value in env.items() if name != warm.ADDRESS}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, script, *arguments], env=env, **pipes, **options)


def command(*arguments: str, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """Runs an entry point to its end; takes the options of `start`."""
    process = start(*arguments, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where tokenised data lie, for all tests that do not look at the cache itself."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def paths(tmp_path, cache):
    """Overrides that keep a test's runs to itself, and the tests' caches from the user's."""
    return [f"paths.runs={tmp_path}/runs", f"paths.cache={cache}"]


@pytest.fixture(scope="session")
def glue_root():
    if not GLUE.is_dir():
        pytest.skip("the real GLUE files are not beside this checkout")
    return GLUE


@pytest.fixture
def runs_dir(tmp_path):
    """adamw: rte 60, 62, 64 (one degenerate mrpc); sam: rte 66, 70 and a diverged run; mrpc seed 2 never started."""
    from test_results_collect import fail, finish, plan, sweep

    runs = tmp_path / "results" / "runs"
    planned = [
        plan(task, "tiny", optimizer, seed)
        for task in ("rte", "mrpc")
        for optimizer in ("adamw", "sam")
        for seed in (0, 1, 2)
    ]
    sweep(runs, "smoke", planned)
    scores = {("rte", "adamw"): (0.60, 0.62, 0.64), ("rte", "sam"): (0.66, 0.70, None)}
    scores |= {("mrpc", "adamw"): (0.80, 0.50, 0.84), ("mrpc", "sam"): (0.81, 0.83, None)}
    for run in planned:
        score = scores[run["task"], run["optimizer"]][run["seed"]]
        if score is not None:
            finish(runs, run, best=score, last=score - 0.1)
        elif run["task"] == "rte":
            finish(runs, run, best=0.99, status="diverged")
        else:
            fail(runs, run)
    return runs


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """RTE by bert_base: adamw, adamw_2x, sam with two rho; three seeds each."""
    from test_results_collect import finish, plan

    runs = tmp_path_factory.mktemp("swept")
    recipe = {"lr": 2e-5, "epochs": 3, "dropout": None}
    scores = {
        ("adamw", 1, 1, None): (0.60, 0.62, 0.64), ("adamw_2x", 2, 1, None): (0.61, 0.61, 0.64),
        ("sam", 1, 2, 0.05): (0.68, 0.66, 0.70), ("sam", 1, 2, 0.1): (0.58, 0.57, 0.60),
    }  # fmt: skip
    for (optimizer, factor, passes, rho), by_seed in scores.items():
        own = (
            recipe
            | {"method": "sam" if rho else "plain", "steps_factor": factor}
            | ({"rho": rho, "mask": "same"} if rho else {})
        )
        train = {"steps": 234 * factor, "seconds": 1, "seconds_per_step": passes, "passes_per_step": passes,
                 "examples_per_second": 1, "peak_memory_bytes": 1e9}  # fmt: skip
        for seed, score in enumerate(by_seed):
            run = plan("rte", "bert_base", optimizer, seed, id=f"{optimizer}-{rho}-{seed}", **own)
            finish(runs, run, best=score, train=train)
    return runs


def pytest_collection_modifyitems(items):
    """Slurm's tests mostly wait: begun first, they wait while the others run."""
    items.sort(key=lambda item: "test_slurm" not in item.nodeid)
