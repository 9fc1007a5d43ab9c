"""Momentum-SAM: SAM without the ascent pass."""

import torch
from torch import Tensor

from .gradients import combine, widest
from .perturbation import Gradients, total_norm
from .sam import SAM
from .step import Step


class MomentumSAM(SAM):
    """The gradient at w − ρ m/‖m‖, with m ← μ m + (1 − μ) ∇ the method's own average of the gradients it returned.

    Becker, Altrock, Risse 2024, Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, arXiv
    2401.12033, algorithm 1. One pass. The sign is the paper's: against the averaged gradient. The paper takes the base
    optimizer's momentum; ours is apart from it, so any optimizer goes. It has the direction of AdamW's first moment at
    β₁ = μ, and of SGD's with momentum μ without weight decay: the authors' code for SGD (MarlonBecker/MSAM) has the
    decay in its buffer, for AdamW (adamW_msam.py) none.
    The returned loss is that at w − ρ m/‖m‖, not at w: the method never visits w. The first step is plain.

    Args:
        rho: length of the step aside, ≥ 0; 0 equals plain training bit for bit.
        momentum: μ, in [0, 1).
    """

    passes = 1.0

    def __init__(self, params, rho: float = 0.05, momentum: float = 0.9, **options):
        super().__init__(params, rho, **options)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
        self.momentum = momentum
        self.average: list[Tensor | None] = [None] * len(self.params)

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        self.average = self._like_params(self.average)
        size = total_norm(self.average)
        scale = torch.where(size > 0, -self.rho / widest(size), 0)
        step.report["perturbation_norm"] = scale.abs() * size
        with step.at(self.average, scale):
            losses, gradient = step.gradient()
        if step.is_finite(total_norm(gradient)):
            self.average = combine(self.average, gradient, 1 - self.momentum, self.momentum)
        return losses, gradient

    def state_dict(self) -> dict:
        return super().state_dict() | {"average": list(self.average)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.average = self._like_params(state["average"])
