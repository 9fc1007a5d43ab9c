"""SAM and ASAM: the gradient at the worst point of a ball around the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Closure, Method
from .gradients import dense
from .perturbation import perturbed, total_norm


class SAM(Method):
    """ε = ρ g/‖g‖ with g the mean gradient; the step's gradient is the mean gradient at w + ε.

    Foret et al. 2021, Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412, eq. 2.

    Args:
        rho: radius of the ball, ≥ 0; 0 equals plain training bit for bit.
    """

    passes = 2.0
    by_rows = True  # not inherited: see _rows_suffice

    def __init__(self, params, rho: float = 0.05, **options):
        super().__init__(params, **options)
        if not rho >= 0:
            raise ValueError(f"rho must be at least 0, got {rho}")
        self.rho = rho

    def _backward(self, closures: list[Closure], scaler) -> Tensor:
        losses, gradient = self._ascent_gradient(closures)
        loss = losses.mean()
        if self.ranks is not None:
            loss, gradient = self.ranks.joint(loss, gradient, self.params, len(losses))
        self._clean_pass_done()
        direction, norm = self._direction(gradient)
        if scaler is not None and not torch.isfinite(norm):
            for p, g in zip(self.params, gradient, strict=True):
                p.grad = dense(g)  # the scaler finds it, skips the step and lowers its scale
            return loss
        self._require_finite(norm, loss)
        scale = self.rho / norm if norm > 0 else torch.zeros_like(norm)
        self.report["perturbation_norm"] = scale * (norm if direction is gradient else total_norm(direction))
        with perturbed(self.params, direction, float(scale)):
            self._descend(closures, scaler)
        return loss

    def _ascent_gradient(self, closures: list[Closure]) -> tuple[Tensor, Sequence[Tensor | None]]:
        """(losses at w (B,), the gradient along which to ascend)."""
        return self._gradient(closures, self.params, by_rows=self._rows_suffice())

    def _rows_suffice(self) -> bool:
        """Whether the ascent's gradient of the word embeddings, half of a small encoder's weights, may stay sparse.

        It may where only `total_norm` and `perturbed` meet it. A subclass may make more of it, so that it must say so
        itself; processes reduce dense gradients.
        """
        return vars(type(self)).get("by_rows", False) and self.ranks is None

    def _direction(self, gradient: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], Tensor]:
        """(d, n) such that ε = ρ d/n."""
        return gradient, total_norm(gradient)


class ASAM(SAM):
    """ε = ρ T² g/‖T g‖ with T = |w| + η: a ball that scales with each weight.

    Kwon et al. 2021, ASAM: Adaptive Sharpness-Aware Minimization, arXiv 2102.11600, eq. 7. ρ is about ten times SAM's.
    """

    def __init__(self, params, rho: float = 0.5, eta: float = 0.01, **options):
        super().__init__(params, rho, **options)
        if not eta >= 0:
            raise ValueError(f"eta must be at least 0, got {eta}")
        self.eta = eta

    def _direction(self, gradient):
        present = [g for g in gradient if g is not None]
        scales = torch._foreach_abs([p.data for p, g in zip(self.params, gradient, strict=True) if g is not None])
        torch._foreach_add_(scales, self.eta)
        scaled = torch._foreach_mul(present, scales)
        norm = total_norm(scaled)
        torch._foreach_mul_(scaled, scales)
        directions = iter(scaled)
        return [None if g is None else next(directions) for g in gradient], norm
