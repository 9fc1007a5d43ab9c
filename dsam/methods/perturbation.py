"""Moving the weights to w + ε and back, exactly; and the random state that both sides of a comparison share."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]


def total_norm(tensors: Gradients) -> Tensor:
    """Euclidean norm over all tensors together, as a float32 (or wider) scalar on the first one's device.

    Sparse ones must be coalesced.
    """
    present = [t.values() if t.is_sparse else t for t in tensors if t is not None]
    if not present:
        return torch.zeros(())
    if any(t.dtype.itemsize < 4 for t in present):  # whose norm would be rounded, and of float16 soon infinite
        norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in present]
        return of_all_shards(torch.stack(norms).norm())
    return of_all_shards(torch.nn.utils.get_total_norm(present))


def of_all_shards(number: Tensor) -> Tensor:
    """What was computed from the shards of tensors that several processes hold (DTensor), made whole; else itself."""
    return number.full_tensor() if hasattr(number, "full_tensor") else number


@contextmanager
def perturbed(params: Sequence[Tensor], direction: Gradients, scale: float | Tensor = 1.0) -> Iterator[None]:
    """Inside, every parameter holds w + scale · direction; afterwards, whatever happened, exactly w again.

    The perturbed weights are new tensors and the parameters point at them for a while: the originals are not written,
    `w + ε − ε ≠ w` cannot happen, and a graph recorded at w stays valid. Where the direction is None the parameter is
    left alone. Only where it is sparse (and coalesced), that of an embedding table, are its rows written in place and
    their copies put back: the backward pass of a lookup does not read its table.

    A scale that is a tensor on the CPU counts as a number; nobody waits for one on another device.
    """
    if isinstance(scale, Tensor) and scale.device.type == "cpu":
        scale = float(scale)
    given = [(p, d) for p, d in zip(params, direction, strict=True) if d is not None]
    moved = [(p, d) for p, d in given if not d.is_sparse]
    tables = [(p.data, d.indices()[0], d.values()) for p, d in given if d.is_sparse]
    rows_before = [table[rows] for table, rows, _ in tables]
    originals = [p.data for p, _ in moved]
    try:
        for table, rows, step in tables:
            table.index_add_(0, rows, step * scale)
        if moved:
            if isinstance(scale, Tensor):
                there = torch._foreach_mul([d for _, d in moved], scale)
                torch._foreach_add_(there, originals)
            else:
                there = torch._foreach_add(originals, [d for _, d in moved], alpha=scale)
            for (p, _), w in zip(moved, there, strict=True):
                p.data = w
            torch.clear_autocast_cache()  # else an enclosing autocast would go on using casts of the old weights
        yield
    finally:
        for (table, rows, _), before in zip(tables, rows_before, strict=True):
            table.index_copy_(0, rows, before)
        for (p, _), w in zip(moved, originals, strict=True):
            p.data = w
        torch.clear_autocast_cache()


class Mark(NamedTuple):
    """A place in all the streams that a pass may draw from."""

    torch: list[Tensor]
    python: tuple
    numpy: Any

    def equals(self, other: "Mark") -> bool:
        """Whether nothing was drawn between the two. Cheap, and without a wait: all states are the host's."""
        (_, keys, *place), (_, others, *its_place) = self.numpy, other.numpy
        host = self.python == other.python and np.array_equal(keys, others) and place == its_place
        return host and all(map(torch.equal, self.torch, other.torch))


class RandomState:
    """The states of PyTorch's default generators, the CPU's and those of the devices of `params`, which dropout draws
    from, and of Python's and NumPy's, from which some models and closures draw (SpecAugment). RuntimeError where a
    device's cannot be read, and masks so not be replayed."""

    def __init__(self, params: Sequence[Tensor]):
        self.params = params

    @property
    def devices(self) -> list[torch.device]:
        """Where the parameters are now, which may be elsewhere than when the method was made."""
        return sorted({p.device for p in self.params if p.device.type not in ("cpu", "meta")}, key=str)

    def get(self) -> list[Tensor]:
        """PyTorch's alone."""
        return [torch.get_rng_state(), *(_of(d, "get_rng_state")() for d in self.devices)]

    def set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for device, there in zip(self.devices, state[1:], strict=True):
            _of(device, "set_rng_state")(there)

    def mark(self) -> Mark:
        return Mark(self.get(), random.getstate(), np.random.get_state())

    def return_to(self, mark: Mark) -> None:
        self.set(mark.torch)
        random.setstate(mark.python)
        np.random.set_state(mark.numpy)

    @contextmanager
    def replay(self, mark: Mark) -> Iterator[None]:
        """Inside, draws start at `mark`; outside, the streams go on as if nothing had been drawn."""
        outside = self.mark()
        self.return_to(mark)
        try:
            yield
        finally:
            self.return_to(outside)

    @contextmanager
    def aside(self, seed: int) -> Iterator[None]:
        """Inside, draws come from streams of their own; outside, nothing was drawn."""
        outside = self.mark()
        torch.default_generator.manual_seed(seed)
        for device in self.devices:
            with torch.get_device_module(device).device(device) if device.index is not None else nullcontext():
                torch.get_device_module(device).manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            self.return_to(outside)


def _of(device: torch.device, name: str) -> Callable:
    """The device's own torch.cuda.get_rng_state, or what it is called there. RuntimeError where it has none."""
    module = torch.get_device_module(device)
    if not hasattr(module, name):
        raise RuntimeError(f"dropout masks cannot be replayed on {device}: PyTorch has no {name} for it")
    if device.type == "mps":  # the only one, and so it takes no device
        return getattr(module, name)
    return partial(getattr(module, name), device=device)
