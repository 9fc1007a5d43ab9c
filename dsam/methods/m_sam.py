"""m-SAM: each group of examples has its own perturbation."""

import torch
from torch import Tensor

from .gradients import add
from .perturbation import Gradients, total_norm
from .sam import SAM
from .step import Step


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

    local_only = "its groups of examples are each process's own"

    def __init__(self, params, rho: float = 0.05, m: int = 8, **options):
        super().__init__(params, rho, **options)
        if not m >= 1:
            raise ValueError(f"m must be at least 1, got {m}")
        self.m = m

    def compute(self, step: Step) -> tuple[Tensor, Gradients]:
        sizes = step.sizes()
        examples, seen, norms = sum(sizes), [], []
        total: list[Tensor | None] | None = None
        for start in range(0, examples, self.m):
            part = step.restricted(_between(start, start + self.m, sizes), sizes)
            losses, ascent = part.gradient(ascent=True)
            norm = total_norm(ascent)
            part.require_finite(norm, losses, ascent)
            with part.at(ascent, torch.where(norm > 0, self.rho / norm, 0)):
                _, gradient = part.gradient(weights=torch.full_like(losses, 1 / examples))
            total = add(total, gradient)
            seen.append(losses)
            norms.append(norm)
        assert total is not None
        step.report |= {"groups": float(len(norms)), "group_gradient_norm": torch.stack(norms).mean()}
        return torch.cat(seen), total


def _between(start: int, end: int, sizes: list[int]) -> list[tuple[int, list[int]]]:
    """The batch's examples from `start` to before `end`: (piece, indices in it) of each piece that they are in."""
    parts, offset = [], 0
    for k, size in enumerate(sizes):
        first, last = max(start - offset, 0), min(end - offset, size)
        if first < last:
            parts.append((k, list(range(first, last))))
        offset += size
    return parts
