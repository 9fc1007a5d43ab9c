"""How much each example of a batch counts in the ascent: the p_i of ε = ρ Σ p_i g_i / ‖Σ p_i g_i‖.

A weighting sees the losses and what a probe saw, and answers with scores; power and mix are common to all:
p_i ∝ score_i ** power, then p ← (1 − mix) p + mix/B. What is known of each formula stands in its class:
[abstract] or [summary] of the paper (arXiv 2112.08772), [derived] here, or another paper's number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from .gradients import wide, widest

ABSENT = cast(Tensor, None)
"""In place of what was not looked at, since the weighting does not read it."""


@dataclass
class Probe:
    """What was seen besides the losses; B examples, K random directions v of norm `radius`."""

    rho: float = 0.0
    radius: float = 0.0
    dimension: int = 0  # of v
    plus: Tensor = ABSENT  # (K, B) losses at w + v
    minus: Tensor = ABSENT  # (K, B) losses at w − v
    norms: Tensor = ABSENT  # (B,) ‖g_i‖, exact
    cosines: Tensor = ABSENT  # (B,) between g_i and the mean gradient, exact
    gram: Tensor = ABSENT  # (B, B) g_i · g_j, exact
    curvature: Tensor = ABSENT  # (B,) ‖H_i ĝ_i‖, exact
    logits: Tensor = ABSENT  # (B, C), where the closure keeps them
    labels: Tensor = ABSENT  # (B,)


class Weighting:
    """Weights (B,), non-negative, summing to 1.

    Args:
        power: tempers the scores; 0 is uniform, 1 the formula as it stands.
        mix: share of the uniform weights that is mixed in, 0 to 1.
        probes: random directions per step (their losses' differences are averaged); only where `sides` > 0.
        radius: norm of a probe. 0.3 to 1 is where float32 differences are accurate (bf16's are not).
        layers: probe only the weights of so many top layers (and all that follows them), from the hidden states of the
            clean pass: `layers` of L layers' share of a forward. None: the whole model.
    """

    sides = 0
    """No-grad forwards per probe: 0 (no probe), 1 (w + v) or 2 (w ± v)."""
    noise = "gaussian"
    exact: Sequence[str] = ()
    """Which exact fields of `Probe` it reads: norms, cosines, gram, curvature."""
    needs_logits = False
    of_likelihood = False
    """Whether it takes the losses for cross-entropies (or squared errors of one output)."""

    def __init__(
        self,
        power: float = 1.0,
        mix: float = 0.0,
        probes: int = 1,
        radius: float = 0.5,
        layers: int | None = None,
    ):
        for name, value, good in (
            ("power", power, power >= 0),
            ("mix", mix, 0 <= mix <= 1),
            ("probes", probes, probes >= 1),
            ("radius", radius, 0 < radius < math.inf),
            ("layers", layers, layers is None or layers >= 1),
        ):
            if not good:
                raise ValueError(f"{name} cannot be {value}")
        self.power, self.mix, self.probes, self.radius, self.layers = power, mix, probes, radius, layers

    def idle(self) -> str:
        """The options of a probe that were given, as `layers=2`; of a weighting that has none."""
        usual = {"probes": 1, "radius": 0.5, "layers": None}
        return ", ".join(f"{name}={value}" for name, value in vars(self).items() if value != usual.get(name, value))

    def __call__(self, losses: Tensor, probe: Probe) -> Tensor:
        """Weights (B,) in at least float32 for `losses` (B,) at w."""
        losses = wide(losses.detach())
        score = self.scores(losses, probe).to(losses.dtype)
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

    The first reading of δ-SAM (`optimizer=dsam`). v1's abstract has "unguarded instances are up-weighted" by "efficient
    guardedness estimation" [abstract]; that the estimate is the change of loss at Gaussian-perturbed weights, and that
    larger changes weigh more, is from a summary [summary]; absolute values and one probe are ours [derived].
    """

    sides = 1

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        return (probe.plus - losses).abs().mean(0)


class Curvature(Weighting):
    """p_i ∝ h_i/‖g_i‖ from losses at w ± v. Two no-grad forwards a probe. [derived]

    The other reading of δ-SAM (`optimizer=dsam_curvature`). v4's abstract has "theoretically principled weighting
    factors" [abstract], a summary "instances with larger gradient changes are up-weighted" and "three additional fast
    forward passes" [summary], which losses at w, w + v and w − v fit; the formula is ours.
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
    """p_i ∝ exp(λ‖g_i‖). RW-SAM, arXiv 2509.18001. One no-grad forward a probe, or none with norms="exact".

    norms="probe": ‖g_i‖² ≈ mean over probes of d (ℓ_i(w + v) − ℓ_i(w))²/‖v‖², v a Rademacher vector in d dimensions.
    """

    sides = 1
    noise = "rademacher"

    def __init__(self, lam: float = 1.0, norms: str = "probe", **options):
        super().__init__(**options)
        if norms not in ("probe", "exact"):
            raise ValueError(f"norms must be 'probe' or 'exact', got {norms!r}")
        self.lam = lam
        if norms == "exact":
            self.sides, self.exact = 0, ("norms",)

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        if self.exact:
            norms = probe.norms
        else:
            norms = (probe.dimension * (probe.plus - losses).square().mean(0)).sqrt() / probe.radius
        exponent = self.lam * norms
        return torch.exp(exponent - exponent.max())


class Gap(Weighting):
    """p_i ∝ ρ‖g_i‖ − g_i·ε, ε = ρ g/‖g‖ with g the mean gradient: how far, to first order, SAM's perturbation falls
    short of the example's own. [derived] from "unguarded instances are up-weighted". Exact norms and products
    with the mean gradient: 0.4 to 0.55 of a training pass more than SAM (results/benchmark/steps.md)."""

    exact = ("norms", "cosines")

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        return probe.norms * (1 - probe.cosines).clamp_min(0)


class RelativeGap(Gap):
    """p_i ∝ 1 − cos(g_i, g): the gap as a share of the example's own worst rise. [derived]; costs what `gap` costs."""

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        return (1 - probe.cosines).clamp_min(0)


class GaussNewton(Weighting):
    """p_i ∝ h_i/‖g_i‖ with h_i = ‖H_i ĝ_i‖ and H_i ≈ J_iᵀ(diag p − p pᵀ)J_i, J_i the Jacobian of the logits. [derived]

    With r = p − e_y, D = diag p − p pᵀ and J_i J_iᵀ taken to be isotropic, h_i/‖g_i‖ = ‖g_i‖ ‖D r‖/‖r‖³; for two
    classes this is ‖g_i‖ p_y/(1 − p_y) and needs no such assumption. Squared error: ‖g_i‖/(2 ℓ_i). The denominators
    are kept above `floor` times their mean over the batch. Exact norms and the softmax; no extra forward.
    """

    exact = ("norms",)
    needs_logits = of_likelihood = True

    def __init__(self, floor: float = 0.1, **options):
        super().__init__(**options)
        if not floor > 0:
            raise ValueError(f"floor must be above 0, got {floor}")
        self.floor = floor

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        if probe.labels.is_floating_point():
            return probe.norms / torch.maximum(2 * losses, self.floor * (2 * losses).mean()).clamp_min(1e-12)
        p = wide(probe.logits).softmax(-1)
        r = p - torch.nn.functional.one_hot(probe.labels.long(), p.shape[-1])
        dr = p * r - p * (p * r).sum(-1, keepdim=True)
        size = r.norm(dim=-1)
        size = torch.maximum(size, self.floor * size.mean()).clamp_min(1e-12)
        return probe.norms * dr.norm(dim=-1) / size**3


class Confidence(Weighting):
    """p_i ∝ p_y = exp(−ℓ_i), the probability of the true class; `power` tempers it. No cost. Exploratory, [derived]:
    for two classes the part of the Gauss-Newton weight that the logits alone give."""

    of_likelihood = True

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        return torch.exp(-losses)


class ExactCurvature(Weighting):
    """p_i ∝ ‖H_i ĝ_i‖/‖g_i‖, exactly. [derived]; for study: two more passes, where `PerInstance` needs none."""

    exact = ("norms", "curvature")

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        return probe.curvature / probe.norms.clamp_min(torch.finfo(probe.norms.dtype).tiny)


class Equalised(Weighting):
    """Weights whose perturbation raises every loss by the same share of its own worst rise, as nearly as can be:
    non-negative c with Σ_j ĝ_i·ĝ_j c_j ≈ 1 for all i (least squares, ridge), p_j ∝ c_j/‖g_j‖. [derived]

    Exact Gram matrix: about a backward pass.
    """

    exact = ("norms", "gram")

    def __init__(self, ridge: float = 1.0, **options):
        super().__init__(**options)
        if not ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {ridge}")
        self.ridge = ridge

    def scores(self, losses: Tensor, probe: Probe) -> Tensor:
        from scipy.optimize import nnls  # half a second that no other weighting needs

        norms = widest(probe.norms).clamp_min(1e-30)
        cosines = (widest(probe.gram) / norms[:, None] / norms[None, :]).cpu().numpy()
        n = len(cosines)
        if not np.isfinite(cosines).all():  # the solver would raise; weights that are NaN are found in the gradient
            return torch.full_like(norms, torch.nan)
        system = np.vstack([cosines, self.ridge**0.5 * np.eye(n)])
        c, _ = nnls(system, np.concatenate([np.ones(n), np.zeros(n)]))
        return torch.from_numpy(c).to(norms) / norms


WEIGHTINGS: dict[str, type[Weighting]] = {
    "uniform": Uniform,
    "probe": LossChange,
    "curvature": Curvature,
    "gibbs": Gibbs,
    "gap": Gap,
    "relative_gap": RelativeGap,
    "gauss_newton": GaussNewton,
    "confidence": Confidence,
    "exact_curvature": ExactCurvature,
    "equalised": Equalised,
}


def make_weighting(name: str, **options) -> Weighting:
    """The weighting called `name`. Raises ValueError for an unknown name or option."""
    if name not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {name!r}; known: {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[name](**options)
