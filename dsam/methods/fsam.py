"""F-SAM: the ascent leaves out what the batch's gradient shares with those before it."""

import torch
from torch import Tensor

from .gradients import combine
from .perturbation import Gradients, total_norm
from .sam import SAM
from .step import Step


class FSAM(SAM):
    """ε = ρ d/‖d‖ with d = g − σ m, m the moving average of the gradients of the ascents; m ← λ m + (1 − λ) g.

    Li et al. 2024, Friendly Sharpness-Aware Minimization, arXiv 2403.12350. Two passes. As we understand the official
    code, m is the average *before* this step and starts as the first g, whose own step is SAM's; the paper's algorithm
    can also be read with this step's g in m, which only rescales: g − σ m' = (1 − σ(1−λ)) g − σ λ m.

    Args:
        sigma: how much of the average is taken away, ≥ 0; 0 is SAM.
        decay: λ, in [0, 1).
    """

    def __init__(self, params, rho: float = 0.05, sigma: float = 1.0, decay: float = 0.9, **options):
        super().__init__(params, rho, **options)
        if not sigma >= 0:
            raise ValueError(f"sigma must be at least 0, got {sigma}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.sigma, self.decay = sigma, decay
        self.average: list[Tensor | None] | None = None

    def direction(self, gradient: Gradients) -> tuple[Gradients, Tensor]:
        if self.average is None:
            return gradient, total_norm(gradient)
        self.average = self._like_params(self.average)
        direction = combine(gradient, self.average, -self.sigma)
        # A layer that this pass skipped is not moved, and one that none had reached before has nothing to leave out. A
        # gradient that is not finite shows in the direction's norm.
        moved = [None if g is None else d for g, d in zip(gradient, direction, strict=True)]
        norm = total_norm(moved)
        # What is left of a gradient that equals the average is rounding, which would be blown up to the length ρ.
        rounding = min(100 * max(torch.finfo(p.dtype).eps for p in self.params), 0.02)
        return moved, torch.where(norm > rounding * total_norm(gradient), norm, 0) + 0 * norm

    def descent(self, step: Step, losses: Tensor, ascent: Gradients) -> list[Tensor | None]:
        gradient = super().descent(step, losses, ascent)  # which ends where the ascent is not finite
        before = self.average or [None] * len(ascent)
        self.average = [self._moved(m, g) for m, g in zip(before, ascent, strict=True)]
        return gradient

    def _moved(self, average: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        """A parameter's average begins with its first gradient, and stays where a pass does not reach it."""
        if gradient is None:
            return average
        return gradient.clone() if average is None else (average * self.decay).add_(gradient * (1 - self.decay))

    def state_dict(self) -> dict:
        return super().state_dict() | {"average": self.average}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.average = state["average"] and self._like_params(state["average"])
