"""LookSAM: SAM's ascent every k steps, its direction reused in between."""

import torch
from torch import Tensor

from .base import Closure
from .gradients import combine, gradient_apart, without_component
from .perturbation import total_norm
from .sam import SAM


class LookSAM(SAM):
    """Every k-th step is SAM's and keeps g_v, its gradient's part orthogonal to g; the others use g + α ‖g‖/‖g_v‖ g_v.

    Liu et al. 2022, Towards Efficient and Scalable Sharpness-Aware Minimization, arXiv 2203.02714, algorithm 1 (without
    the layer-wise scaling of Look-LayerSAM). 1 + 1/k passes per step on average; the first step is SAM's.

    Args:
        k: steps from one ascent to the next, ≥ 1; 1 is SAM.
        alpha: weight of the reused part, ≥ 0.
    """

    passes = 1.2

    def __init__(self, params, rho: float = 0.05, k: int = 5, alpha: float = 0.7, **options):
        super().__init__(params, rho, **options)
        if not k >= 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        self.k, self.alpha = k, alpha
        self.passes = 1 + 1 / k
        self.step = 0
        self.reused: list[Tensor | None] = [None] * len(self.params)

    def _ascent_gradient(self, closures: list[Closure]):
        losses, self._at_w = super()._ascent_gradient(closures)
        return losses, self._at_w

    def _backward(self, closures: list[Closure], scaler) -> Tensor:
        ascend = self.step % self.k == 0
        with gradient_apart(self.params):
            loss = super()._backward(closures, scaler) if ascend else self._descend(closures, scaler)
            gradient = [p.grad for p in self.params]
            norm = total_norm(gradient)
            if torch.isfinite(norm):  # else nothing is learnt, and the next step is of the same kind
                self.step += 1
                if not ascend:
                    size = total_norm(self.reused)
                    scale = self.alpha * norm / size if size > 0 else torch.zeros_like(norm)
                    for p, g in zip(self.params, combine(gradient, self.reused, scale), strict=True):
                        p.grad = g
                elif self.k > 1:
                    self._keep(gradient, norm)
        self._at_w = None
        self.report["ascended"] = float(ascend)
        return loss

    def _keep(self, gradient: list[Tensor | None], norm: Tensor) -> None:
        reused = without_component(gradient, self._at_w)  # times a scaler's scale, which the ratio takes away again
        # What is left where the two gradients are equal is rounding, which the ratio ‖g‖/‖g_v‖ would blow up.
        rounding = 100 * max(torch.finfo(p.dtype).eps for p in self.params)
        if self.rho == 0 or total_norm(reused) <= rounding * norm:
            reused = [None] * len(reused)
        self.reused = reused

    def state_dict(self) -> dict:
        return super().state_dict() | {"step": self.step, "reused": list(self.reused)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.step, self.reused = state["step"], list(state["reused"])
