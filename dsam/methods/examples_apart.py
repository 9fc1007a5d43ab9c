"""Whether the examples of a batch stay apart in a model, without which there is no gradient of one example."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .layer_kinds import kind_of
from .step import Step
from .taps import Unsupported, hooked


def require_examples_apart(model: nn.Module) -> None:
    """ValueError where an example's loss depends on the other examples of its batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"'{name}' ({type(module).__name__}) makes an example's loss depend on the batch's others: there is no "
                "gradient of one example; use GroupNorm or LayerNorm, or put it into evaluation mode"
            )


def require_own_rows(model: nn.Module, step: Step) -> None:
    """Once, at the first piece with as many tokens as examples, where shapes do not tell the two apart: raises
    Unsupported where a layer's output has as many rows as there are examples, but not one for each."""
    for k, piece in enumerate(step.pieces if "rows" not in step.checked else ()):
        if piece.square:
            examples = piece.size or 1
            of_all = _rows(model, partial(step.aside, k), examples)
            fewer = piece.restricted(list(range(examples - 1)))
            of_fewer = _rows(model, partial(step.aside, k, fewer), examples - 1)
            for name, count in of_all.items():
                if count == examples == of_fewer.get(name):
                    raise Unsupported(f"per-example gradients: the output of '{name}' has no row for each example")
            step.checked.add("rows")
            return


def _rows(model: nn.Module, run: Callable[[], Tensor], examples: int) -> dict[str, int]:
    """Rows of the output of each module that there are formulas for, by name."""
    seen: dict[str, int] = {}

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        seen.setdefault(name, len(output))

    modules = [(name, module) for name, module in model.named_modules() if kind_of(module) is not None]
    with hooked(model, modules, note, lambda: examples), torch.no_grad():
        run()
    return seen
