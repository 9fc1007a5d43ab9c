"""δ-SAM: one perturbation for the batch, in which the examples count as a weighting says."""

import torch
from torch import Tensor

from .base import Closure
from .per_example import PerExampleGradients
from .perturbation import RandomState, perturbed, total_norm
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
        self.weighting = make_weighting(weighting, **weighting_options) if isinstance(weighting, str) else weighting
        self.recompute = recompute

    def _ascent_gradient(self, closures: list[Closure]):
        if self.weighting.exact:
            return self._exact_ascent_gradient(closures)
        hold = len(closures) == 1 or not self.recompute
        held = []
        for k in range(len(closures)):
            with torch.set_grad_enabled(hold):
                held.append(self._forward(closures, k, ascent=True))
        self._clean_pass_done()
        losses = torch.cat([piece.detach() for piece in held])
        weights = self.weighting(*self._probe(closures, losses))
        self._report_weights(weights)
        total, start = None, 0
        for k, piece in enumerate(held):
            if not hold:
                piece = self._forward(closures, k, ascent=True)
            held[k] = None  # its graph is freed by the backward pass
            weighted = (piece * weights[start : start + len(piece)]).sum()
            total = self._add_gradient(total, weighted, self.params, len(closures))
            start += len(piece)
        return losses, total

    def _exact_ascent_gradient(self, closures: list[Closure]):
        """As above with exact per-example quantities: one backward pass over the activations serves for the norms and
        for the weighted gradient."""
        if self.module is None:
            raise ValueError(f"weighting {type(self.weighting).__name__} looks inside the model: DeltaSAM(model, …)")
        pieces, recorded = [], []
        for k in range(len(closures)):
            gradients = PerExampleGradients(self.module, self.params)
            with gradients.record():
                losses = self._forward(closures, k, ascent=True)
            pieces.append(losses.detach())
            gradients.backward(losses)
            recorded.append(gradients)
            self.report["backwards"] += 1 / len(closures)
        self._clean_pass_done()
        losses = torch.cat(pieces)
        _, probe = self._probe(closures, losses)
        self._look(recorded, pieces, closures, probe)
        weights = self.weighting(losses, probe)
        self._report_weights(weights)
        return losses, _weighted(recorded, weights.split([len(piece) for piece in pieces]))

    def _look(self, recorded: list[PerExampleGradients], pieces: list[Tensor], closures, probe: Probe) -> None:
        """Fills in the exact fields that the weighting reads."""
        exact = self.weighting.exact
        probe.norms = torch.cat([g.squared_norms() for g in recorded]).sqrt()
        if "cosines" in exact:
            examples = sum(len(piece) for piece in pieces)
            mean = _weighted(recorded, [torch.full_like(piece, 1 / examples) for piece in pieces])
            products = torch.cat([g.dots(mean) for g in recorded])
            probe.cosines = products / (probe.norms * total_norm(mean)).clamp_min(torch.finfo(products.dtype).tiny)
        if "gram" in exact:
            if len(recorded) > 1:
                raise ValueError("the Gram matrix needs the undivided batch: one closure, not a sequence")
            probe.gram = recorded[0].gram()
        if "curvature" in exact:
            probe.curvature = torch.cat([self._curvature(closure) for closure in closures])

    def _curvature(self, closure) -> Tensor:
        """‖H_i ĝ_i‖ for each example of the closure, by differences of its gradient along its own gradient."""
        if not hasattr(closure, "subset"):
            raise ValueError(
                "weighting 'exact_curvature' takes examples one by one: pass dsam.ExampleLosses(model, batch)"
            )
        found = []
        with self.random.replay(self.random.get()):
            for i in range(len(closure)):
                found.append(hessian_product(closure.subset([i]), self.params, self.random)[2])
        return torch.stack(found)

    def _report_weights(self, weights: Tensor) -> None:
        self.report["effective_sample_size"] = 1 / weights.square().sum()
        self.report["largest_weight"] = weights.max()

    def _probe(self, closures: list[Closure], losses: Tensor) -> tuple[Tensor, Probe]:
        """(losses at w to compare with, what the probes saw): losses at w ± v for random directions v, same masks."""
        probe = Probe(rho=self.rho, radius=self.weighting.radius, dimension=sum(p.numel() for p in self.params))
        if self.weighting.needs_logits:
            if any(getattr(closure, "logits", None) is None for closure in closures):
                raise ValueError("this weighting reads the logits: pass dsam.ExampleLosses(model, batch)")
            probe.logits = torch.cat([closure.logits for closure in closures])
            probe.labels = torch.cat([closure.labels for closure in closures])
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
        like = [
            {"size": p.shape, "generator": self.generator, "device": p.device, "dtype": p.dtype} for p in self.params
        ]
        if self.weighting.noise == "rademacher":
            return [torch.randint(0, 2, **options).mul_(2).sub_(1) for options in like]
        return [torch.randn(**options) for options in like]


def _weighted(recorded: list[PerExampleGradients], weights) -> list[Tensor]:
    """Σ over pieces of Σ_i weights[piece][i] g_i."""
    total = recorded[0].weighted_gradient(weights[0])
    for gradients, piece in zip(recorded[1:], weights[1:], strict=True):
        torch._foreach_add_(total, gradients.weighted_gradient(piece))
    return total


def hessian_product(closure: Closure, params: list[Tensor], random: RandomState, step: float = 1e-2):
    """(gradient g, H ĝ by a central difference of gradients, ‖H ĝ‖) of the closure's mean loss along its own gradient.

    `step` is the length of the difference, long enough for float32: TRAPS of finite differences concern losses, of
    which this takes none.
    """
    state = random.get()

    def gradient() -> list[Tensor]:
        with random.replay(state):
            found = torch.autograd.grad(closure().mean(), params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]

    own = gradient()
    norm = total_norm(own)
    if not norm > 0:
        return own, [torch.zeros_like(g) for g in own], torch.zeros_like(norm)
    with perturbed(params, own, float(step / norm)):
        ahead = gradient()
    with perturbed(params, own, float(-step / norm)):
        behind = gradient()
    product = torch._foreach_sub(ahead, behind)
    torch._foreach_div_(product, 2 * step)
    return own, product, total_norm(product)
