"""AE-SAM: SAM in the steps whose gradient is large for its time, plain steps else."""

import torch
from torch import Tensor

from .base import Closure
from .gradients import gradient_apart
from .perturbation import perturbed, total_norm
from .sam import SAM


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

    def _backward(self, closures: list[Closure], scaler) -> Tensor:
        losses, gradient = self._gradient(closures, self.params)
        self._clean_pass_done()
        loss, norm = losses.mean(), total_norm(gradient)
        if scaler is None:
            self._require_finite(norm, loss)
        ascend = bool(torch.isfinite(norm)) and self._is_large(float(norm) ** 2)
        self.report["ascended"] = float(ascend)
        if ascend:
            scale = self.rho / float(norm) if norm > 0 else 0.0
            self.report["perturbation_norm"] = scale * norm
            if self.mask == "fresh":
                self._states = [None] * len(closures)
            with perturbed(self.params, gradient, scale):
                self._descend(closures, scaler)
        else:
            with gradient_apart(self.params):
                for p, g in zip(self.params, gradient, strict=True):
                    p.grad = g if g is None or scaler is None else g * scaler.get_scale()
            if scaler is not None:
                scaler.scale(loss)  # so that the scaler, which has seen no loss in this step, is ready
        return loss

    def _is_large(self, square: float) -> bool:
        self.mean = square if self.mean is None else self.decay * self.mean + (1 - self.decay) * square
        self.variance = self.decay * self.variance + (1 - self.decay) * (square - self.mean) ** 2
        return square >= self.mean + self.threshold * self.variance**0.5

    def _forward(self, closures: list[Closure], k: int, *, ascent: bool = False, precise: bool = False) -> Tensor:
        return super()._forward(closures, k, ascent=ascent != (self.mask == "fresh"), precise=precise)

    def state_dict(self) -> dict:
        return super().state_dict() | {"mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.mean, self.variance = state["mean"], state["variance"]
