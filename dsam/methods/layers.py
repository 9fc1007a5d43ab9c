"""The top layers of an encoder on their own: passes that start from the hidden states of an earlier pass."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .perturbation import RandomState


class TopLayers:
    """The last `count` layers of a Hugging Face encoder and all that follows them (pooler, classifier).

        top = TopLayers(model, 2)
        with top.record(k):
            losses = closure()           # keeps what enters the top layers, and the random state there
        with top.resume(k):
            again = closure()            # runs the top layers alone, on the same input, with the same dropout masks

    Raises ValueError where the model has no stack of layers or fewer than `count`.
    """

    def __init__(self, model: nn.Module, count: int):
        base = getattr(model, "base_model", model)
        stacks = [
            (owner, name, stack)
            for owner in base.modules()
            for name, stack in owner.named_children()
            if isinstance(stack, nn.ModuleList) and len({type(layer) for layer in stack}) == 1
        ]
        if not stacks:
            raise ValueError(f"layers={count}: {type(model).__name__} has no stack of layers")
        self._owner, self._name, self.stack = max(stacks, key=lambda found: len(found[2]))
        if not 1 <= count <= len(self.stack):
            raise ValueError(f"layers={count}: {type(model).__name__} has {len(self.stack)}")
        self.count, self.share = count, count / len(self.stack)
        self._first = self.stack[-count]
        self._kept: dict[int, tuple[Tensor, list[Tensor]]] = {}
        # Parameters are registered in the order in which they are used: what comes from the first top layer on.
        start = next(iter(self._first.parameters()))
        everything = list(model.parameters())
        place = next(i for i, p in enumerate(everything) if p is start)
        self.params = everything[place:]
        self._random = RandomState(everything)

    @contextmanager
    def record(self, key: int = 0) -> Iterator[None]:
        def keep(_, args: tuple) -> None:
            self._kept[key] = args[0].detach(), self._random.get()

        handle = self._first.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def resume(self, key: int = 0) -> Iterator[None]:
        """Draws inside begin where they began at the top layers, whatever was drawn below."""
        resumed = nn.ModuleList([_Resume(*self._kept[key], self._random), *self.stack[-self.count :]])
        setattr(self._owner, self._name, resumed)
        try:
            yield
        finally:
            setattr(self._owner, self._name, self.stack)

    def clear(self) -> None:
        """Lets go of the hidden states."""
        self._kept.clear()


class _Resume(nn.Module):
    """In place of the lower layers."""

    def __init__(self, hidden: Tensor, state: list[Tensor], random: RandomState):
        super().__init__()
        self.hidden, self.state, self.random = hidden, state, random

    def forward(self, embedded: Tensor, *_, **__) -> Tensor:
        self.random.set(self.state)
        return self.hidden
