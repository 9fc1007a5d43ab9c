"""Which examples make each step's batch, and how a batch is cut so that little of it is padding."""

from collections.abc import Iterator

import numpy as np
import torch

from ..config import AUTO_OVERHEAD, Train

CPU = torch.device("cpu")


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, a permutation of range(examples): the same for every method of a seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(examples, generator=generator).numpy()


def training_subset(examples: int, limit: int | None, seed: int) -> np.ndarray:
    """Indices of the first `limit` examples of a seeded permutation, or of all."""
    if limit is None or limit >= examples:
        return np.arange(examples)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(examples, generator=generator).numpy()[:limit]


def held_out(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """(to train on, held out): a tenth of the training set, at most 2,000 examples, the same for every run."""
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(0)).numpy()
    share = min(max(1, examples // 10), 2000)
    return np.sort(order[share:]), np.sort(order[:share])


def overhead(train: Train, device: torch.device) -> float | None:
    """Padded tokens that one more piece must save; None: none does.

    What a piece costs besides its tokens are casts and gradients of all weights and the dispatch of its operators. In
    bfloat16 that counts four times as much on a CPU, where its tokens take a fraction of the time. A GPU computes all
    of a batch's tokens in less time than it takes to dispatch a piece more.
    """
    given = train.piece_overhead
    if given == "auto":
        if device.type != "cpu":
            return None
        given = AUTO_OVERHEAD
    return None if given is None else given * (4 if train.precision == "bfloat16" else 1)


def pieces(
    indices: np.ndarray, lengths: np.ndarray, train: Train, device: torch.device = CPU, by_length: bool = True
) -> list[np.ndarray]:
    """The batch `indices` cut into micro-batches: at most `micro_batch_size` each, sorted `by_length` where it pays.

    The cut minimises padded tokens plus `overhead` for each piece, over all ways to cut the sorted batch. The
    gradient is that of the undivided batch; only the order in which examples draw dropout masks differs.
    docs/speed.md has the figures.
    """
    most = train.micro_batch_size or len(indices)
    each = overhead(train, device) if by_length else None
    if each is None:
        return [indices[i : i + most] for i in range(0, len(indices), most)]
    order = np.argsort(lengths[indices], kind="stable")
    indices = indices[order]
    longest = lengths[indices]
    n = len(indices)
    cost, cut = np.zeros(n + 1), np.zeros(n + 1, dtype=int)
    for end in range(1, n + 1):  # cost[end]: the cheapest way to cut the first `end` examples
        starts = np.arange(max(0, end - most), end)
        costs = cost[starts] + (end - starts) * longest[end - 1] + each
        best = int(np.argmin(costs))
        cost[end], cut[end] = costs[best], starts[best]
    parts = []
    while n:
        parts.append(indices[cut[n] : n])
        n = cut[n]
    return parts[::-1]


def evaluation_batches(lengths: np.ndarray, tokens: int = 8192) -> Iterator[np.ndarray]:
    """All examples, sorted by length and cut so that a padded batch has at most about `tokens` tokens."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] <= tokens:
            end += 1
        yield order[start:end]
        start = end
