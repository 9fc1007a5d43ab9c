"""LookSAM: SAM's ascent every k steps, its direction reused in between."""

import torch
from torch import Tensor

from .gradients import combine, without_component
from .perturbation import Gradients, total_norm
from .sam import SAM
from .step import Step


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
        self._learnt: list[Tensor | None] | None = None

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        self._learnt = None
        ascend = self.step % self.k == 0
        step.report["ascended"] = float(ascend)
        losses, gradient = step.gradient(ascent=ascend)
        at_w = gradient
        if ascend:
            gradient = self.descent(step, losses, at_w)
        norm = total_norm(gradient)
        if not step.is_finite(norm):  # nothing is learnt, and the next step is of the same kind
            return losses, gradient
        self.reused = self._like_params(self.reused)
        if ascend:
            self._learnt = self._apart(gradient, at_w, norm) if self.k > 1 else self.reused
            return losses, gradient
        self._learnt = self.reused
        # What this step's loss does not reach stays as it is.
        reused = [None if g is None else r for g, r in zip(gradient, self.reused, strict=True)]
        size = total_norm(reused)
        return losses, combine(gradient, reused, torch.where(size > 0, self.alpha * norm / size, 0))

    def commit(self, step: Step) -> None:
        """The step counts, and what it learnt is kept, where every process took it: their steps stay of one kind."""
        if self._learnt is None or (step.scaler and not step.is_finite(total_norm([p.grad for p in self.params]))):
            return
        self.step += 1
        self.reused = self._learnt

    def _apart(self, gradient: Gradients, at_w: Gradients, norm: Tensor) -> list[Tensor | None]:
        reused = without_component(gradient, at_w)
        # What is left where the two gradients are equal is rounding, which the ratio ‖g‖/‖g_v‖ would blow up.
        rounding = min(100 * max(torch.finfo(p.dtype).eps for p in self.params), 0.02)
        if self.rho == 0:
            reused = [None] * len(reused)
        present = [g for g in reused if g is not None]
        if present:
            torch._foreach_mul_(present, (total_norm(present) > rounding * norm).to(norm.dtype))
        return reused

    def state_dict(self) -> dict:
        return super().state_dict() | {"step": self.step, "reused": list(self.reused)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.step, self.reused = state["step"], self._like_params(state["reused"])
