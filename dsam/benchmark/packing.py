"""How many runs an hour one device does, by how many it does at once."""

import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ..config import Config
from ..cpus import cpus
from ..runs.run import peak_memory, prepare, trained_examples
from ..training.batches import epoch_order
from ..training.loop import total_steps
from .steps import Steps, process


@dataclass
class Packed:
    """The figures of `at_once` equal runs beside each other."""

    at_once: int
    seconds: float  # a step of each: the median over rounds of the mean over runs
    runs_per_hour: float  # of all together, by their training steps: start and evaluation not counted
    peak_memory_bytes: int  # of all together; on a GPU what PyTorch took, without its contexts


def measure(config: Config, numbers: Sequence[int], batches: int, rounds: int) -> list[Packed]:
    """Steps of the configuration's method in as many processes as the largest of `numbers`, of which as many as each
    number says work at a time, all numbers in turn, after rounds that do not count (`Steps.unsteady`). Each has
    `device.threads` threads, or an equal part of the cores, as the runs of a sweep.

    Raises BrokenProcessPool where a process dies, as for want of memory.
    """
    ready = prepare(config)  # mistakes show here, and the processes find the tokens cached
    steps = total_steps(config, trained_examples(config, ready.data[ready.task.train[0]]))[0]
    unsteady = Steps(config, ready, None).unsteady
    del ready
    threads = {number: config.device.threads or max(1, cpus() // number) for number in numbers}
    seconds: dict[int, list[float]] = {number: [] for number in numbers}
    memory: dict[int, int] = {}
    with ExitStack() as stack:
        processes = [stack.enter_context(process(_start, config, batches)) for _ in range(max(numbers))]
        for turn in range(1 - unsteady, rounds + 1):
            for number in numbers:
                print(
                    f"{config.task.name}: round {max(turn, 0)}/{rounds}, {number} at once", file=sys.stderr, flush=True
                )
                working = [apart.submit(_steps, threads[number]) for apart in processes[:number]]
                found = [work.result() for work in working]
                if turn > 0:
                    seconds[number].append(statistics.mean(spent for spent, _ in found))
                memory[number] = sum(peak for _, peak in found)
    medians = {number: statistics.median(values) for number, values in seconds.items()}
    return [
        Packed(number, medians[number], 3600 * number / (medians[number] * steps), memory[number]) for number in numbers
    ]


_run: list = []
"""In its process: its steps, the examples that they are over, their number."""


def _start(config: Config, batches: int) -> None:
    ready = prepare(config)
    order = epoch_order(len(ready.data[ready.task.train[0]]), config.seeds.data, 0)
    order = order[: batches * config.train.batch_size]
    batches = -(-len(order) // config.train.batch_size)  # a small training set has fewer
    _run[:] = Steps(config, ready, None), order, batches


def _steps(threads: int) -> tuple[float, int]:
    """(seconds of a step, peak memory in bytes) of a run's first steps."""
    torch.set_num_threads(threads)
    steps, order, batches = _run
    return steps(order) / batches, peak_memory(steps.device)
