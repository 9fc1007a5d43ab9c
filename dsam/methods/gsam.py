"""GSAM: SAM's gradient, and down the surrogate gap."""

from torch import Tensor

from .gradients import combine, without_component
from .perturbation import Gradients
from .sam import SAM
from .step import Step


class GSAM(SAM):
    """∇f_p − α g_⊥ with ∇f_p SAM's gradient and g_⊥ the part of ∇f(w) orthogonal to ∇f_p.

    Zhuang et al. 2022, Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065, algorithm 1.
    Two passes. The paper lets ρ follow the learning rate; here ρ stays constant.

    Args:
        alpha: weight of the orthogonal part, ≥ 0; 0 is SAM.
    """

    stateless = True

    def __init__(self, params, rho: float = 0.05, alpha: float = 0.4, **options):
        super().__init__(params, rho, **options)
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        self.alpha = alpha

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        losses, at_w = step.gradient(ascent=True)
        gradient = self.descent(step, losses, at_w)
        if self.alpha and self.rho:  # at ρ = 0 the orthogonal part is nothing but rounding and other masks
            gradient = combine(gradient, without_component(at_w, gradient), -self.alpha)
        return losses, gradient
