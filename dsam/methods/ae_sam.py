"""AE-SAM: SAM in the steps whose gradient is large for its time, plain steps else."""

from torch import Tensor

from .perturbation import Gradients, total_norm
from .sam import SAM
from .step import Step


class AESAM(SAM):
    """SAM where ‖g‖² ≥ μ + c σ, else plain; μ and σ² are moving averages of ‖g‖² and of its squared deviation from μ.

    Jiang et al. 2023, An Adaptive Policy to Employ Sharpness-Aware Minimization, arXiv 2304.14647 (ICLR 2023):
    μ ← δ μ + (1 − δ) ‖g‖², σ² ← δ σ² + (1 − δ)(‖g‖² − μ)², then the comparison. The paper lets c fall linearly from
    λ₂ to λ₁ over the training, whose length a method does not know: here c is constant. μ starts as the first ‖g‖²
    (ours), so that the first step is SAM's.

    1 + (share of SAM steps) passes; the share depends on the data, and is a half where ‖g‖² is equally often above
    its average as below and c = 0. With mask="fresh" the *second* pass is the one that draws masks aside, since the
    first may be the only one; ρ = 0 then equals plain training in its stream of masks, not bit for bit.

    Args:
        threshold: c.
        decay: δ, in [0, 1).
    """

    passes = 1.5

    def __init__(self, params, rho: float = 0.05, threshold: float = 0.0, decay: float = 0.9, **options):
        super().__init__(params, rho, **options)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.threshold, self.decay = threshold, decay
        self.mean: float | None = None
        self.variance = 0.0

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        losses, gradient = step.gradient()
        norm = total_norm(gradient)
        step.require_finite(norm, losses, gradient)
        size = float(norm)  # the step's one wait for the device: what follows depends on it
        ascend = self._is_large(size**2)
        step.report["ascended"] = float(ascend)
        if not ascend:
            return losses, gradient
        scale = self.rho / size if size > 0 else 0.0
        step.report["perturbation_norm"] = scale * norm
        if self.mask == "fresh":
            step.forget_masks()
        with step.at(gradient, scale):
            _, gradient = step.gradient(ascent=True)  # its masks are an ascent's
        return losses, gradient

    def _is_large(self, square: float) -> bool:
        self.mean = square if self.mean is None else self.decay * self.mean + (1 - self.decay) * square
        self.variance = self.decay * self.variance + (1 - self.decay) * (square - self.mean) ** 2
        return square >= self.mean + self.threshold * self.variance**0.5

    def state_dict(self) -> dict:
        return super().state_dict() | {"mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.mean, self.variance = state["mean"], state["variance"]
