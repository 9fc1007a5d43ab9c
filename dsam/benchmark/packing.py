"""How many runs an hour one device does, by how many it does at once."""

import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Config
from ..errors import UserError
from ..runs.run import peak_memory, prepare, trained_examples
from ..training.loop import total_steps
from .steps import Stepper, batches_of


@dataclass
class Packed:
    """The figures of `at_once` equal runs beside each other."""

    at_once: int
    seconds: float  # a step of each: the median over rounds of the mean over runs
    runs_per_hour: float  # of all together, by their training steps: start and evaluation not counted
    peak_memory_bytes: int  # of all together


def measure(config: Config, numbers: Sequence[int], batches: int, rounds: int) -> list[Packed]:
    """AdamW's steps in as many processes as the largest of `numbers`, of which as many as each number says work at a
    time, all numbers in turn, after a round that does not count. Threads are `device.threads` for each process."""
    ready = prepare(config)  # mistakes show here, and the processes find the tokens cached
    steps = total_steps(config, trained_examples(config, ready.data[ready.task.train_splits[0]]))[0]
    del ready
    context = multiprocessing.get_context("spawn")
    workers = [_Worker(context, config, batches) for _ in range(max(numbers))]
    seconds: dict[int, list[float]] = {number: [] for number in numbers}
    memory: dict[int, int] = {}
    try:
        for turn in range(rounds + 1):
            for number in numbers:
                print(f"{config.task.name}: round {turn}/{rounds}, {number} at once", file=sys.stderr, flush=True)
                for worker in workers[:number]:
                    worker.pipe.send(None)
                spent = []
                for k, worker in enumerate(workers[:number]):
                    took, memory[k] = worker.pipe.recv()
                    spent.append(took / batches)
                if turn:
                    seconds[number].append(statistics.mean(spent))
    except (EOFError, OSError):
        raise UserError(
            f"one of {len(workers)} processes ended (its error is above): take fewer --at-once, or a smaller model"
        ) from None
    finally:
        for worker in workers:
            worker.close()
    medians = {number: statistics.median(values) for number, values in seconds.items()}
    return [
        Packed(
            number, medians[number], 3600 * number / (medians[number] * steps), sum(memory[k] for k in range(number))
        )
        for number in numbers
    ]


class _Worker:
    """A process that takes a run's first steps each time it is asked, and says how long they took."""

    def __init__(self, context, config: Config, batches: int):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, config, batches), daemon=True)
        self.process.start()
        theirs.close()  # so that `recv` raises EOFError should the process die

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def _work(pipe, config: Config, batches: int) -> None:
    model, device, data = batches_of(config, batches)
    step = Stepper(model, "plain", {})
    try:
        while True:
            pipe.recv()
            pipe.send((sum(step(closures) for closures in data), peak_memory(device)))
    except EOFError:  # the measurement is over
        return
