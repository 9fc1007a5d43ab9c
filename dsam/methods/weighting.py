"""How much each example of a batch counts in the ascent: the p_i of ε = ρ Σ p_i g_i / ‖Σ p_i g_i‖.

A weighting sees the losses and what a probe saw, and answers with scores; power and mix are common to all:
p_i ∝ score_i ** power, then p ← (1 − mix) p + mix/B. What is known of each formula stands in its class:
[abstract] or [summary] of the paper (arXiv 2112.08772), [derived] here, or another paper's number.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Probe:
    """What was seen besides the losses; B examples, K random directions v of norm `radius`."""

    rho: float = 0.0
    radius: float = 0.0
    dimension: int = 0  # of v
    plus: Tensor | None = None  # (K, B) losses at w + v
    minus: Tensor | None = None  # (K, B) losses at w − v


class Weighting:
    """Weights (B,), non-negative, summing to 1.

    Args:
        power: tempers the scores; 0 is uniform, 1 the formula as it stands.
        mix: share of the uniform weights that is mixed in, 0 to 1.
        probes: random directions per step (their losses' differences are averaged); only where `sides` > 0.
        radius: norm of a probe. 0.3 to 1 is where float32 differences are accurate (bf16's are not).
    """

    sides = 0
    """No-grad forwards per probe: 0 (no probe), 1 (w + v) or 2 (w ± v)."""
    noise = "gaussian"

    def __init__(self, power: float = 1.0, mix: float = 0.0, probes: int = 1, radius: float = 0.5):
        for name, value, good in (
            ("power", power, power >= 0),
            ("mix", mix, 0 <= mix <= 1),
            ("probes", probes, probes >= 1),
            ("radius", radius, 0 < radius < math.inf),
        ):
            if not good:
                raise ValueError(f"{name} cannot be {value}")
        self.power, self.mix, self.probes, self.radius = power, mix, probes, radius

    @property
    def extra_forwards(self) -> int:
        return self.sides * self.probes

    def __call__(self, losses: Tensor, probe: Probe) -> Tensor:
        """Weights (B,) in float32 for `losses` (B,) at w."""
        losses = losses.detach().float()
        score = self.scores(losses, probe).float()
        if self.power != 1:
            score = score**self.power
        total = score.sum()
        uniform = torch.full_like(score, 1 / len(score))
        # Scores that are all 0 say nothing; infinite or NaN ones must not pass for weights.
        weights = torch.where(total > 0, score / total, uniform + 0 * total)
        return (1 - self.mix) * weights + self.mix * uniform

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        raise NotImplementedError


class Uniform(Weighting):
    """p_i ∝ 1: SAM. No extra cost."""

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        return torch.ones_like(losses)


class LossChange(Weighting):
    """p_i ∝ mean over probes of |ℓ_i(w + v) − ℓ_i(w)|, v Gaussian. One no-grad forward a probe.

    [summary]: per-example losses at Gaussian-perturbed weights, examples with larger changes up-weighted.
    """

    sides = 1

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        return (probe.plus - losses).abs().mean(0)


class Curvature(Weighting):
    """p_i ∝ h_i/‖g_i‖ from losses at w ± v. Two no-grad forwards a probe. [derived]

    h_i ≈ |ℓ_i(w+v) + ℓ_i(w−v) − 2ℓ_i(w)|/‖v‖² and ‖g_i‖ ≈ |ℓ_i(w+v) − ℓ_i(w−v)|/(2‖v‖): the weights for which, with
    H_i ≈ h_i I, the batch's correction mean_i H_i ε equals the per-instance one, mean_i H_i ε_i. The ratio is
    heavy-tailed, so ‖g_i‖ is kept above `floor` times its mean over the batch.
    """

    sides = 2

    def __init__(self, floor: float = 0.3, **options):
        super().__init__(**options)
        if not floor > 0:
            raise ValueError(f"floor must be above 0, got {floor}")
        self.floor = floor

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        curvature = (probe.plus + probe.minus - 2 * losses).abs().mean(0) / probe.radius**2
        slope = (probe.plus - probe.minus).abs().mean(0) / (2 * probe.radius)
        smallest = (self.floor * slope.mean()).clamp_min(torch.finfo(slope.dtype).tiny)
        return curvature / torch.maximum(slope, smallest)


class Gibbs(Weighting):
    """p_i ∝ exp(λ‖g_i‖). RW-SAM, arXiv 2509.18001. One no-grad forward a probe.

    ‖g_i‖² ≈ mean over probes of d (ℓ_i(w + v) − ℓ_i(w))²/‖v‖² with v a Rademacher vector in d dimensions.
    """

    sides = 1
    noise = "rademacher"

    def __init__(self, lam: float = 1.0, **options):
        super().__init__(**options)
        self.lam = lam

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        norms = (probe.dimension * (probe.plus - losses).square().mean(0)).sqrt() / probe.radius
        exponent = self.lam * norms
        return torch.exp(exponent - exponent.max())


WEIGHTINGS: dict[str, type[Weighting]] = {
    "uniform": Uniform,
    "probe": LossChange,
    "curvature": Curvature,
    "gibbs": Gibbs,
}


def make_weighting(name: str, **options) -> Weighting:
    """The weighting called `name`. Raises ValueError for an unknown name or option."""
    if name not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {name!r}; known: {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[name](**options)
