"""What padding costs: the same steps with batches in pieces, undivided, and as one row of tokens."""

import statistics
import sys
import time
from dataclasses import dataclass, replace

import numpy as np

from ..config import Config
from ..errors import UserError
from ..glue import Tokenised
from ..runs.run import prepare
from ..training.batches import epoch_order
from .steps import Steps

WAYS = {
    "pieces": {"padding": "pieces"},
    "padding-free": {"padding": "free"},
    "undivided": {"padding": "pieces", "piece_overhead": None},
    "of one length": {"padding": "pieces", "piece_overhead": None},
}
"""`of one length`: as many tokens in as many rows, which need no padding, undivided; what is left to gain."""
CONTENDERS = {"adamw": ("plain", list(WAYS)), "sam": ("sam", ["pieces", "padding-free"])}


@dataclass
class Way:
    """One method's steps with batches padded in one way."""

    method: str
    name: str
    seconds: float  # a step, the median over batches and rounds
    processor_seconds: float  # a step, of all threads, likewise: what other work on the machine disturbs least
    tokens: float  # a step, padding included


def measure(config: Config, batches: int, rounds: int) -> list[Way]:
    """Times AdamW's steps in every way and SAM's in two, in turn on each batch, after rounds that do not count
    (`Steps.unsteady`). A way that does not go there is left out. UserError where `config` asks for one of them."""
    require_pieces(config, "padding")
    ready, size = prepare(config), config.train.batch_size
    examples = ready.data[ready.task.train[0]]
    order = epoch_order(len(examples), config.seeds.data, 0)[: batches * size]
    even = of_one_length(examples, order, size)
    steps, tokens, optimizer = {}, {}, None
    for method, (called, names) in CONTENDERS.items():
        for name in names:
            chosen = config.model_copy(update={"train": config.train.model_copy(update=WAYS[name])})
            seen, rows = (even, np.arange(len(order))) if name == "of one length" else (examples, order)
            made = Steps(chosen, ready, called, optimizer, seen)
            optimizer = made.optimizer
            if name == "padding-free" and made.backward.packing is None:
                continue  # it would be with padding; `Steps` said why
            steps[method, name] = made, rows
            tokens[method, name] = made.tokens(rows) / -(-len(order) // size)
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {both: [] for both in steps}
    contenders = list(steps.items())
    unsteady = max(made.unsteady for made, _ in steps.values())
    for turn in range(1 - unsteady, rounds + 1):
        print(f"{config.task.name}: padding, round {max(turn, 0)}/{rounds}", file=sys.stderr, flush=True)
        for k in range(0, len(order), size):
            first = (turn + k // size) % len(contenders)  # a way's place changes, so that none always follows another
            for both, (made, rows) in [*contenders[first:], *contenders[:first]]:
                began = time.process_time()
                spent = made(rows[k : k + size]), time.process_time() - began
                if turn > 0:
                    seconds[both].append(spent)
    return [Way(*both, *map(statistics.median, zip(*seconds[both], strict=True)), tokens[both]) for both in steps]


def require_pieces(config: Config, what: str) -> None:
    """UserError where `config` says the way that the measurement `what` times beside the other."""
    if config.train.padding != "pieces":
        raise UserError(f"train.padding={config.train.padding}: --what {what} times both ways: leave it out")


def of_one_length(examples: Tokenised, order: np.ndarray, size: int) -> Tokenised:
    """The examples `order`, in batches of `size`: each batch's tokens anew in rows of its mean length, rounded."""
    taken = examples.take(order)
    lengths, tokens = [], []
    for k in range(0, len(order), size):
        start, end = taken.offsets[k], taken.offsets[min(k + size, len(order))]
        rows = min(size, len(order) - k)
        length = max(1, round((end - start) / rows))
        lengths += [length] * rows
        tokens.append(start + np.arange(rows * length) % (end - start))
    places = np.concatenate(tokens)
    types = taken.token_type_ids
    return replace(
        taken,
        input_ids=taken.input_ids[places],
        token_type_ids=None if types is None else types[places],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )
