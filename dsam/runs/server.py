"""The process that runs are forked from: it has imported torch and transformers and done nothing else, so that a run
starts at once and inherits no state. A sweep's own process needs neither, and starts in a third of the time."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

PRELOADED = ["dsam.runs.run", "sklearn.metrics", "scipy.stats", "wandb"]


def context() -> multiprocessing.context.BaseContext:
    """For processes forked from it."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def call(function: Callable, *arguments):
    """What `function(*arguments)` returns or raises, in a process of its own. BrokenProcessPool where that is
    killed."""
    with ProcessPoolExecutor(1, context()) as process:
        return process.submit(function, *arguments).result()
