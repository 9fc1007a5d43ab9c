"""SAM and ASAM: the gradient at the worst point of a ball around the weights."""

import torch
from torch import Tensor

from .base import Method, require_number
from .perturbation import Gradients, total_norm
from .step import Step


class SAM(Method):
    """ε = ρ g/‖g‖ with g the mean gradient; the step's gradient is the mean gradient at w + ε.

    Foret et al. 2021, Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412, eq. 2.

    Args:
        rho: radius of the ball, ≥ 0; 0 equals plain training bit for bit.
    """

    stateless = True
    passes = 2.0

    def __init__(self, params, rho: float = 0.05, **options):
        super().__init__(params, **options)
        require_number(rho=rho)
        if not rho >= 0:
            raise ValueError(f"rho must be at least 0, got {rho}")
        self.rho = rho

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        losses, ascent = self.ascent(step)
        return losses, self.descent(step, losses, ascent)

    def ascent(self, step: Step) -> tuple[Tensor, Gradients]:
        """(losses at w (B,), the gradient along which to ascend)."""
        return step.gradient(ascent=True, by_rows=self.takes_rows())

    def descent(self, step: Step, losses: Tensor, ascent: Gradients) -> list[Tensor | None]:
        """The mean gradient at w + ε, equation 2; `losses` are those at w."""
        direction, norm = self.direction(ascent)
        step.require_finite(norm, losses, ascent)
        scale = torch.where(norm > 0, self.rho / norm, 0)
        step.report["perturbation_norm"] = scale * (norm if direction is ascent else total_norm(direction))
        with step.at(direction, scale):
            _, gradient = step.gradient()
        return gradient

    def direction(self, gradient: Gradients) -> tuple[Gradients, Tensor]:
        """(d, n) such that ε = ρ d/n."""
        return gradient, total_norm(gradient)

    def takes_rows(self) -> bool:
        """Whether the ascent's gradient of the word embeddings, half of a small encoder's weights, may stay sparse.

        It may where only the norm and the move meet it; a subclass with another direction gets dense gradients.
        """
        return type(self).direction is SAM.direction


class ASAM(SAM):
    """ε = ρ T² g/‖T g‖ with T = |w| + η: a ball that scales with each weight.

    Kwon et al. 2021, ASAM: Adaptive Sharpness-Aware Minimization, arXiv 2102.11600, eq. 7. ρ is about ten times SAM's.
    """

    stateless = True

    def __init__(self, params, rho: float = 0.5, eta: float = 0.01, **options):
        super().__init__(params, rho, **options)
        if not eta >= 0:
            raise ValueError(f"eta must be at least 0, got {eta}")
        self.eta = eta

    def direction(self, gradient: Gradients) -> tuple[Gradients, Tensor]:
        present = [g for g in gradient if g is not None]
        scales = torch._foreach_abs([p.data for p, g in zip(self.params, gradient, strict=True) if g is not None])
        torch._foreach_add_(scales, self.eta)
        scaled = torch._foreach_mul(present, scales)
        norm = total_norm(scaled)
        torch._foreach_mul_(scaled, scales)
        directions = iter(scaled)
        return [None if g is None else next(directions) for g in gradient], norm
