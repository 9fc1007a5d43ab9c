"""What a closure may offer besides its losses, asked for in one place."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Closure = Callable[[], Tensor]
"""Runs the model on one (micro-)batch and returns its per-example losses, shape (B,)."""


class Outputs(Protocol):
    """What the methods that compare a model's outputs need of a closure, as `ExampleLosses` has it; noise on the
    embeddings needs the first two."""

    @property
    def embedding_shape(self) -> tuple[int, int, int]: ...

    @property
    def token_mask(self) -> Tensor: ...

    def outputs(self, noise: Tensor | None = None, detached: bool = False) -> tuple[Tensor, Tensor]: ...

    def __len__(self) -> int: ...


class Piece:
    """One closure of a step. It need not have more than a call; `ExampleLosses` has all that is asked for here."""

    def __init__(self, closure: Closure):
        if not callable(closure):
            raise TypeError(
                f"a closure must be callable and return the batch's losses, got {_kind(closure)}: "
                "method.backward(lambda: losses(model(x), y))"
            )
        self.closure: Any = closure

    @property
    def size(self) -> int | None:
        """B, where the closure says it before it runs."""
        return len(self.closure) if hasattr(self.closure, "__len__") else None

    @property
    def model(self) -> nn.Module | None:
        """What it runs, where it says so."""
        model = getattr(self.closure, "model", None)
        return model if isinstance(model, nn.Module) else None

    @property
    def words(self) -> nn.Embedding | None:
        """The table of word embeddings whose gradient may be sparse."""
        return getattr(self.closure, "words", None)

    @property
    def word_ids(self) -> Tensor | None:
        """The only rows of `words` that it looks up, where it says so."""
        return getattr(self.closure, "word_ids", None)

    @property
    def autocast(self) -> torch.dtype | None:
        return getattr(self.closure, "autocast", None)

    @property
    def labelled_logits(self) -> tuple[Tensor, Tensor] | None:
        """(logits (B, C), labels (B,)) of the latest call, where the closure keeps them."""
        logits = getattr(self.closure, "logits", None)
        return None if logits is None else (logits, self.closure.labels)

    @property
    def outputs(self) -> Outputs | None:
        if not callable(getattr(self.closure, "outputs", None)) or self.size is None:
            return None
        if hasattr(self.closure, "require_outputs"):
            self.closure.require_outputs()
        return self.closure

    @property
    def restrictable(self) -> bool:
        """Whether some of its examples can be run without the others."""
        return hasattr(self.closure, "subset")

    def restricted(self, indices: list[int]) -> "Piece":
        """Some of its examples; where the closure cannot run them alone it runs them all and their losses are taken."""
        if self.restrictable:
            return Piece(self.closure.subset(indices))
        return Piece(lambda: self.closure()[indices])

    def losses(self, precise: bool = False) -> Tensor:
        """Losses, shape (B,); `precise`: in float32 where the closure can."""
        losses = require_losses(getattr(self.closure, "in_float32", self.closure)() if precise else self.closure())
        if self.size not in (None, len(losses)):
            raise ValueError(
                f"the closure's len() is {self.size} examples, but it returned {len(losses)} losses: one that keeps "
                "something of its own for each example needs a subset(indices) of its own"
            )
        return losses


def require_losses(losses: Any) -> Tensor:
    """What a closure gave, if it is one loss for each example. TypeError or ValueError for what is not."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"the closure must return a tensor of per-example losses, shape (B,), got {_kind(losses)}")
    if losses.ndim != 1 or not losses.is_floating_point():
        raise ValueError(
            "the closure must return per-example losses of shape (B,), e.g. with reduction='none'; "
            f"got shape {tuple(losses.shape)}"
        )
    if not len(losses):
        raise ValueError("the closure returned no losses: an empty batch has no gradient")
    return losses


def pieces_of(closure: Closure | Sequence[Closure]) -> list[Piece]:
    """The pieces of a step. TypeError or ValueError for what is none."""
    if callable(closure):
        return [Piece(closure)]
    if closure is None or isinstance(closure, Tensor) or not hasattr(closure, "__iter__"):
        return [Piece(closure)]  # type: ignore[arg-type]  # refused there
    closures = list(closure)
    pieces = [Piece(one) for one in closures]
    if not pieces:
        raise ValueError("backward needs at least one closure")
    _require_apart(closures)
    return pieces


def _require_apart(closures: Sequence[Closure]) -> None:
    """ValueError for functions that a loop made over its own variables: all of them see the last values."""
    known: dict[tuple, Closure] = {}
    for one in closures:
        if isinstance(one, FunctionType):
            values = [*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values(), *(one.__closure__ or ())]
            first = known.setdefault((one.__code__, *map(id, values)), one)
            if first is not one:
                raise ValueError(
                    "two closures of the batch are one function over the same variables, as a lambda in a loop is, "
                    "which sees the loop's last values: bind them, lambda x=x, y=y: …; [f] * n is n times the same"
                )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
