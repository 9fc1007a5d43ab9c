"""δ-SAM: one perturbation for the batch, in which the examples count as a weighting says."""

import torch
from torch import Tensor

from .base import Closure
from .perturbation import perturbed, total_norm
from .sam import SAM
from .weighting import Probe, Weighting, make_weighting


class DeltaSAM(SAM):
    """ε = ρ Σ p_i g_i / ‖Σ p_i g_i‖; the step's gradient is the plain mean gradient at w + ε.

    Zhou, Liu, Zhang, Chen 2022, δ-SAM: Sharpness-Aware Minimization with Dynamic Reweighting, arXiv 2112.08772.
    **A reconstruction**: no official code exists and only the abstracts and summaries of the paper could be read;
    `weighting.py` gives the standing of each p.

    Costs two passes and the weighting's extra no-grad forwards (about a sixth of SAM each): the probes are compared
    with the very forward whose backward makes the ascent, with the same dropout masks.

    Args:
        rho: radius, ≥ 0.
        weighting: a name from `WEIGHTINGS` or a `Weighting`.
        recompute: with several micro-batches, run each one's forward again instead of holding all their graphs
            until the weights of the whole batch are known: less memory, one more forward pass.
        weighting_options: the options of the named weighting (power, mix, probes, radius, …).
    """

    def __init__(
        self,
        params,
        rho: float = 0.05,
        weighting: str | Weighting = "probe",
        *,
        recompute: bool = False,
        mask: str = "same",
        seed: int = 0,
        **weighting_options,
    ):
        super().__init__(params, rho, mask=mask, seed=seed)
        self.weighting = (
            make_weighting(weighting, **weighting_options) if isinstance(weighting, str) else weighting
        )
        self.recompute = recompute

    def _ascent_gradient(self, closures: list[Closure]):
        hold = len(closures) == 1 or not self.recompute
        held = []
        for k in range(len(closures)):
            with torch.set_grad_enabled(hold):
                held.append(self._forward(closures, k, ascent=True))
        self._clean_pass_done()
        losses = torch.cat([piece.detach() for piece in held])
        weights = self.weighting(*self._probe(closures, losses))
        self.report["effective_sample_size"] = 1 / weights.square().sum()
        self.report["largest_weight"] = weights.max()
        total, start = None, 0
        for k, piece in enumerate(held):
            if not hold:
                piece = self._forward(closures, k, ascent=True)
            held[k] = None  # its graph is freed by the backward pass
            weighted = (piece * weights[start : start + len(piece)]).sum()
            total = self._add_gradient(total, weighted, self.params, len(closures))
            start += len(piece)
        return losses, total

    def _probe(self, closures: list[Closure], losses: Tensor) -> tuple[Tensor, Probe]:
        """(losses at w to compare with, what the probes saw): losses at w ± v for random directions v, same masks."""
        probe = Probe(rho=self.rho, radius=self.weighting.radius, dimension=sum(p.numel() for p in self.params))
        if not self.weighting.sides:
            return losses, probe
        if any(getattr(closure, "autocast", None) for closure in closures):
            losses = self._losses(closures)  # float32 on both sides of the difference
        plus, minus = [], []
        for _ in range(self.weighting.probes):
            noise = self._noise()
            scale = self.weighting.radius / float(total_norm(noise))
            with perturbed(self.params, noise, scale):
                plus.append(self._losses(closures))
            if self.weighting.sides == 2:
                with perturbed(self.params, noise, -scale):
                    minus.append(self._losses(closures))
        probe.plus = torch.stack(plus)
        probe.minus = torch.stack(minus) if minus else None
        return losses, probe

    @torch.no_grad()
    def _losses(self, closures: list[Closure]) -> Tensor:
        return torch.cat([self._forward(closures, k, ascent=True, precise=True).float() for k in range(len(closures))])

    def _noise(self) -> list[Tensor]:
        """A random direction in the parameters, unscaled."""
        like = [{"size": p.shape, "generator": self.generator, "device": p.device, "dtype": p.dtype} for p in self.params]
        if self.weighting.noise == "rademacher":
            return [torch.randint(0, 2, **options).mul_(2).sub_(1) for options in like]
        return [torch.randn(**options) for options in like]
