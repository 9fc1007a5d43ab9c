"""A model's buffers (running statistics, …): a step leaves in them what one clean pass does."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class _Buffer(NamedTuple):
    """Where a buffer is, itself, and what it held."""

    place: dict[str, Tensor | None]
    name: str
    buffer: Tensor
    value: Tensor


def movable(model: nn.Module | None) -> list[nn.Module]:
    """The modules with buffers that a pass may move: none if all of the model is in evaluation mode."""
    modules = [] if model is None else list(model.modules())
    return [m for m in modules if m._buffers] if any(m.training for m in modules) else []


@contextmanager
def kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What happens inside to buffers of these modules goes again."""
    before: list[_Buffer] = []
    try:
        for module in modules:
            before += _copied(module)
        yield
    finally:
        _put_back(before)


@contextmanager
def reruns_undone(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Around a backward pass, in which checkpointed layers run once more, at w + ε maybe: what that does to their
    buffers goes again. What the pass itself writes there, as a hook on a gradient, stays."""
    before: dict[nn.Module, list[_Buffer]] = {}

    def first(module: nn.Module, _) -> None:
        if module not in before:
            before[module] = _copied(module)

    handles = [module.register_forward_pre_hook(first) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for own in before.values():
            _put_back(own)


def _copied(module: nn.Module) -> list[_Buffer]:
    """From now on passes move copies of the module's buffers, so that a graph recorded before stays valid."""
    place = module._buffers
    found = [_Buffer(place, name, buffer, buffer.data) for name, buffer in place.items() if buffer is not None]
    for one in found:
        one.buffer.data = one.value.clone()
    return found


def _put_back(before: Iterable[_Buffer]) -> None:
    for one in before:
        one.buffer.data = one.value
        one.place[one.name] = one.buffer  # a pass may have put another in its place
