"""How long a step takes on the device, for the stages that time one."""

import statistics
import time
from collections.abc import Callable

import torch


def wait() -> None:
    """Until the GPU, where there is one, has done all that it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], turns: int = 5) -> float:
    """A step's time, the median over `turns` of four each: within these the host runs ahead, as it does in a run."""
    spent = []
    for _ in range(turns):
        wait()
        began = time.perf_counter()
        for _ in range(4):
            step()
        wait()
        spent.append((time.perf_counter() - began) / 4)
    return statistics.median(spent)
