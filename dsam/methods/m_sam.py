"""m-SAM: each group of examples has its own perturbation."""

import torch
from torch import Tensor

from .base import Closure
from .gradients import buffers_kept
from .losses import restricted
from .perturbation import perturbed, total_norm
from .sam import SAM


class GroupSAM(SAM):
    """The mean of the SAM gradients of groups of m consecutive examples: mean over groups G of ∇ℓ_G(w + ρ g_G/‖g_G‖).

    Foret et al. 2021, arXiv 2010.01412, §4.1 (m-sharpness); Andriushchenko & Flammarion 2022, Towards Understanding
    Sharpness-Aware Minimization, arXiv 2206.06232. m = B is SAM. Groups are weighted by their size (the last may be
    smaller) and run on across micro-batches. Where the training loop sorts a batch by length, so are the groups.

    Two passes, in 2⌈B/m⌉ pieces, where the closure has `subset(indices)` as `ExampleLosses` has. Any other closure is
    run in full for each group and once more to count its examples: the same gradient, ⌈B/m⌉ times dearer. Dropout:
    mask="same" gives both passes of a group the same masks; they are the group's own with `subset`.

    Args:
        rho: radius of each group's ball, ≥ 0. At 0 the plain gradient up to rounding.
        m: examples in a group, ≥ 1.
    """

    def __init__(self, params, rho: float = 0.05, m: int = 8, **options):
        super().__init__(params, rho, **options)
        if not m >= 1:
            raise ValueError(f"m must be at least 1, got {m}")
        self.m = m

    def _backward(self, closures: list[Closure], scaler) -> Tensor:
        sizes = [self._size(closures, k) for k in range(len(closures))]
        examples, spent = sum(sizes), dict(self.report)
        cost, groups, loss, norms = 0.0, 0, 0.0, 0.0
        states = self._states
        for start in range(0, examples, self.m):
            parts, origin, offset = [], [], 0
            for k, (closure, size) in enumerate(zip(closures, sizes, strict=True)):
                first, last = max(start - offset, 0), min(start + self.m - offset, size)
                if first < last:
                    parts.append(restricted(closure, list(range(first, last))))
                    origin.append(k)
                    cost += ((last - first) if hasattr(closure, "subset") else size) / examples
                offset += size
            self._states = [states[k] for k in origin]
            losses, gradient = self._gradient(parts, self.params)
            norm = total_norm(gradient)
            if scaler is None:
                self._require_finite(norm, losses.mean())
            norms, groups, loss = norms + norm, groups + 1, loss + losses.sum() / examples
            scale = torch.where(norm > 0, self.rho / norm, 0) if torch.isfinite(norm) else norm
            weights = torch.full_like(losses, 1 / examples)
            with buffers_kept(self.module), perturbed(self.params, gradient, float(scale)):
                self._descend(parts, scaler, weights)
        self.report |= {"forwards": spent["forwards"] + 2 * cost, "backwards": spent["backwards"] + 2 * cost}
        self.report |= {"groups": float(groups), "group_gradient_norm": norms / groups}
        return loss

    def _size(self, closures: list[Closure], k: int) -> int:
        """Examples in piece k. A closure that cannot be restricted is run once to count them; this fixes its masks."""
        if hasattr(closures[k], "subset"):
            return len(closures[k])
        with torch.no_grad():
            size = len(self._forward(closures, k, ascent=True))
        if k == len(closures) - 1:
            self._clean_pass_done()
        return size
