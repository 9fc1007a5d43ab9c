"""GSAM: SAM's gradient, and down the surrogate gap."""

from torch import Tensor

from .base import Closure
from .gradients import combine, gradient_apart, without_component
from .sam import SAM


class GSAM(SAM):
    """∇f_p − α g_⊥ with ∇f_p SAM's gradient and g_⊥ the part of ∇f(w) orthogonal to ∇f_p.

    Zhuang et al. 2022, Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065, algorithm 1.
    Two passes. The paper lets ρ follow the learning rate; here ρ stays constant.

    Args:
        alpha: weight of the orthogonal part, ≥ 0; 0 is SAM.
    """

    def __init__(self, params, rho: float = 0.05, alpha: float = 0.4, **options):
        super().__init__(params, rho, **options)
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        self.alpha = alpha

    def _ascent_gradient(self, closures: list[Closure]):
        losses, self._at_w = super()._ascent_gradient(closures)
        return losses, self._at_w

    def _backward(self, closures: list[Closure], scaler) -> Tensor:
        try:
            with gradient_apart(self.params):
                loss = super()._backward(closures, scaler)
                if self.alpha and self.rho:  # at ρ = 0 the orthogonal part is nothing but rounding and other masks
                    perturbed_gradient = [p.grad for p in self.params]
                    scale = 1.0 if scaler is None else scaler.get_scale()
                    orthogonal = without_component(self._at_w, perturbed_gradient)
                    both = combine(perturbed_gradient, orthogonal, -self.alpha * scale)
                    for p, g in zip(self.params, both, strict=True):
                        p.grad = g
            return loss
        finally:
            self._at_w = None
