"""Per-example quantities of any model, from passes over single examples: what `per_example` has no formulas for."""

import torch
from torch import Tensor

from .gradients import dense, outside_autocast, wide
from .perturbation import Gradients
from .step import Step

HELD = 2**28
"""Numbers of single examples' gradients held at a time; beyond, they are computed again."""


class OneByOne:
    """Gradients g_i = ∇ℓ_i of the examples of a step, each from a pass of its own; they are never all held.

    The step's masks must be fixed: its batch has run. With dropout an example on its own draws its mask from the
    same state as its batch did, which is one of the same law and not the batch's.
    """

    def __init__(self, step: Step):
        self._step, self._sizes = step, step.sizes()
        self._places = [(k, i) for k, size in enumerate(self._sizes) for i in range(size)]
        self._numbers = [p.numel() for p in step.params]

    def __len__(self) -> int:
        return len(self._places)

    def gradient(self, i: int) -> Tensor:
        """g_i end to end, in at least float32."""
        k, place = self._places[i]
        alone = self._step.restricted([(k, [place])], self._sizes)
        with torch.enable_grad():
            loss = alone.losses(0, ascent=True).sum()
            share = 1 if self._step.scaler is None else 2.0 ** -(len(self) - 1).bit_length()  # of a mean, as scaled
            found, _ = alone.differentiate(None, loss * share, alone.costs[0])
        pairs = zip(found, self._step.params, strict=True)
        return torch.cat([wide(torch.zeros_like(p) if g is None else dense(g)).flatten() for g, p in pairs]) / share  # type: ignore[arg-type]

    def squared_norms(self) -> Tensor:
        """‖g_i‖², shape (B,)."""
        return self._stacked([self.gradient(i).square().sum() for i in range(len(self))])

    def squared_norms_and_mean_dots(self) -> tuple[Tensor, Tensor]:
        """(‖g_i‖², g_i · g), each (B,), with g the mean gradient: two passes over each example."""
        squares, total = [], self._zeros(sum(self._numbers))
        for i in range(len(self)):
            gradient = self.gradient(i)
            squares.append(gradient.square().sum())
            total += gradient
        mean = total / len(self)
        return self._stacked(squares), self._stacked([_product(self.gradient(i), mean) for i in range(len(self))])

    def gram(self) -> Tensor:
        """g_i · g_j: (B, B)."""
        size = max(1, HELD // sum(self._numbers))
        found = self._zeros(len(self), len(self))
        for start in range(0, len(self), size):
            block = torch.stack([self.gradient(i) for i in range(start, min(start + size, len(self)))])
            found[start : start + size, start : start + size] = _product(block, block.mT)
            for j in range(start + size, len(self)):
                found[start : start + size, j] = found[j, start : start + size] = _product(block, self.gradient(j))
        return found

    def curvature(self, step: float = 1e-2) -> Tensor:
        """‖H_i ĝ_i‖, shape (B,), by central differences along steps of this length."""
        found = []
        for i in range(len(self)):
            own = self.gradient(i)
            norm = own.norm()
            scale, direction = torch.where(norm == 0, 0, step / norm), self._split(own)
            with self._step.at(direction, scale):
                ahead = self.gradient(i)
            with self._step.at(direction, -scale):
                found.append((ahead - self.gradient(i)).norm() / (2 * step))
        return self._stacked(found)

    def _split(self, flat: Tensor) -> Gradients:
        parts = zip(flat.split(self._numbers), self._step.params, strict=True)
        return [part.view_as(p).to(p.dtype) for part, p in parts]

    def _zeros(self, *shape: int) -> Tensor:
        return wide(self._step.params[0].new_zeros(shape)).detach()

    def _stacked(self, numbers: list[Tensor]) -> Tensor:
        return torch.stack(numbers) if numbers else self._zeros(0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in its own precision also inside the caller's autocast."""
    with outside_autocast(a.device):
        return a @ b
