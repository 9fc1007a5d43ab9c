"""δ-SAM: one perturbation for the batch, in which the examples count as a weighting says."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .base import Closure
from .gradients import whole
from .layers import TopLayers
from .per_example import PerExampleGradients
from .perturbation import perturbed, total_norm
from .sam import SAM
from .weighting import Probe, Weighting, make_weighting


class DeltaSAM(SAM):
    """ε = ρ Σ p_i g_i / ‖Σ p_i g_i‖; the step's gradient is the plain mean gradient at w + ε.

    Zhou, Liu, Zhang, Chen 2022, δ-SAM: Sharpness-Aware Minimization with Dynamic Reweighting, arXiv 2112.08772.
    **A reconstruction**: no official code exists and only the abstracts and summaries of the paper could be read;
    `weighting.py` gives the standing of each p.

    Costs two passes and the weighting's extra no-grad forwards (a sixth of SAM each, by count): the probes are compared
    with the very forward whose backward makes the ascent (under autocast with one more, in float32), with the same
    dropout masks.

    Args:
        rho: radius, ≥ 0.
        weighting: a name from `WEIGHTINGS` or a `Weighting`.
        recompute: with several micro-batches, run each one's forward again instead of holding all their graphs
            until the weights of the whole batch are known: less memory, one more forward pass.
        weighting_options: the options of the named weighting (power, mix, probes, radius, layers, …);
            `optimizer=dsam` has layers=2, here the default is the whole model.
    """

    by_rows = True

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
        self._top: TopLayers | None = None  # the layers that probes reach, where that is not the whole model
        if self.weighting.sides and self.weighting.layers is not None:
            if self.module is None:
                raise ValueError("layers looks inside the model: DeltaSAM(model, …)")
            self._top = TopLayers(self.module, self.weighting.layers)

    def _ascent_gradient(self, closures: list[Closure]):
        if self.weighting.exact:
            return self._exact_ascent_gradient(closures)
        with self._summing(closures, self._rows_suffice()):
            losses, total = self._weighted_gradient(closures)
        return losses, whole(total, self._rows_suffice())

    def _weighted_gradient(self, closures: list[Closure]):
        """(losses at w (B,), Σ_i p_i g_i), with a forward pass for the weights and one backward pass."""
        hold = len(closures) == 1 or not self.recompute
        held = []
        for k in range(len(closures)):
            with torch.set_grad_enabled(hold), self._top.record(k) if self._top is not None else nullcontext():
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
        batch = PerExampleGradients.joined(recorded)
        exact = self.weighting.exact
        if "cosines" in exact:
            squares, products = batch.squared_norms_and_mean_dots()
            probe.norms = squares.sqrt()
            limits = torch.finfo(products.dtype)
            # ‖g‖² = mean_i g_i·g, where it is more than what rounding leaves of gradients that cancel.
            size = torch.maximum(products.mean(), limits.eps * squares.mean()).sqrt()
            probe.cosines = (products / (probe.norms * size).clamp_min(limits.tiny)).clamp(-1, 1)
        else:
            probe.norms = batch.squared_norms().sqrt()
        if "gram" in exact:
            probe.gram = batch.gram()
        if "curvature" in exact:
            probe.curvature = torch.cat([self._curvature(closures, k, g) for k, g in enumerate(recorded)])
        weights = self.weighting(losses, probe)
        self._report_weights(weights)
        return losses, batch.weighted_gradient(weights, self._rows_suffice())

    def _curvature(self, closures: list[Closure], k: int, gradients: PerExampleGradients) -> Tensor:
        def losses() -> Tensor:
            self.report["backwards"] += 1 / len(closures)
            return self._forward(closures, k, ascent=True)

        return curvature_along_own_gradients(gradients, losses)

    def _report_weights(self, weights: Tensor) -> None:
        self.report["effective_sample_size"] = 1 / weights.square().sum()
        self.report["largest_weight"] = weights.max()

    def _probe(self, closures: list[Closure], losses: Tensor) -> tuple[Tensor, Probe]:
        """(losses at w to compare with, what the probes saw): losses at w ± v for random directions v, same masks."""
        params = self.params
        if self._top is not None:
            above = {id(p) for p in self._top.params}
            params = [p for p in params if id(p) in above]
        probe = Probe(rho=self.rho, radius=self.weighting.radius, dimension=sum(p.numel() for p in params))
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
            noise, not_drawn = self._noise(params, closures)
            scale = self.weighting.radius / math.sqrt(float(total_norm(noise)) ** 2 + not_drawn)
            with perturbed(params, noise, scale):
                plus.append(self._losses(closures))
            if self.weighting.sides == 2:
                with perturbed(params, noise, -scale):
                    minus.append(self._losses(closures))
        probe.plus = torch.stack(plus)
        probe.minus = torch.stack(minus) if minus else None
        if self._top is not None:
            self._top.clear()
        return losses, probe

    @torch.no_grad()
    def _losses(self, closures: list[Closure]) -> Tensor:
        found, share = [], self._top.share if self._top is not None else 1.0
        for k in range(len(closures)):
            with self._top.resume(k) if self._top is not None else nullcontext():
                found.append(self._forward(closures, k, ascent=True, precise=True, share=share).float())
        return torch.cat(found)

    def _noise(self, params: list[nn.Parameter], closures: list[Closure]) -> tuple[list[Tensor], int]:
        """(a random direction in the parameters, of unit variance; how many of its elements are not drawn).

        Of the word embeddings only the rows that the batch looks up are drawn, a sparse tensor: the others change no
        loss, and count with their expected square.
        """
        draw = rademacher if self.weighting.noise == "rademacher" else torch.randn
        words, direction, not_drawn = getattr(closures[0], "words", None), [], 0
        if self.ranks is not None:  # whose batches differ, but not their probes
            words = None
        for p in params:
            like = {"generator": self.generator, "device": p.device, "dtype": p.dtype}
            if words is not None and p is words.weight:
                rows = torch.cat([closure.inputs["input_ids"].flatten() for closure in closures]).unique()
                values = draw((len(rows), p.shape[1]), **like)
                found = torch.sparse_coo_tensor(rows[None], values, p.shape, is_coalesced=True, check_invariants=False)
                not_drawn += p.numel() - values.numel()
            else:
                found = draw(p.shape, **like)
            direction.append(found)
        return direction, not_drawn


def rademacher(shape, *, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Independent signs ±1, 64 from each 64-bit draw."""
    n = math.prod(shape)
    draws = torch.empty((n + 63) // 64, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
    signs = (draws.view(torch.uint8)[:, None] & bits != 0).to(dtype)
    return signs.mul_(2).sub_(1).flatten()[:n].view(shape)


def curvature_along_own_gradients(
    gradients: PerExampleGradients, losses: Callable[[], Tensor], step: float = 1e-2
) -> Tensor:
    """‖H_i ĝ_i‖, shape (B,), of the examples recorded in `gradients`; `losses()` runs their batch again.

    Central differences of gradients, in two passes over the batch. `step` is their length, long enough for float32:
    TRAPS of finite differences concern losses, of which this takes none.
    """
    norms = gradients.squared_norms().sqrt()
    scales = torch.where(norms == 0, 0, step / norms)
    sides = []
    for sign in (1, -1):
        there = gradients.like()
        with gradients.perturbed(sign * scales):
            with there.record():
                found = losses()
            there.backward(found)
        sides.append(there)
    ahead, behind = sides
    return ahead.minus(behind).squared_norms().sqrt() / (2 * step)
