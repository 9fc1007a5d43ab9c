"""δ-SAM: one perturbation for the batch, in which the examples count as a weighting says."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .examples_apart import batch_norms, require_examples_apart, require_own_gradients, require_sound
from .factors import joined
from .gradients import tf32_products, widest
from .layers import DoesNotFit, TopLayers
from .losses import example_losses
from .one_by_one import OneByOne
from .per_example import PerExampleGradients, Unsupported
from .perturbation import Gradients, total_norm
from .sam import SAM
from .step import Step
from .weighting import WEIGHTINGS, Probe, Weighting, make_weighting

LIKELIHOOD = "the losses are those of the logits"  # what `Method.checked` then has


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

    stateless = True

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
        if weighting_options and not isinstance(weighting, str):
            raise TypeError(
                f"{', '.join(weighting_options)}: a weighting that is made already has its options; give them to "
                f"{type(weighting).__name__}(…)"
            )
        self.weighting = make_weighting(weighting, **weighting_options) if isinstance(weighting, str) else weighting
        self.recompute = recompute
        if not self.weighting.sides and (idle := self.weighting.idle()):
            self.note(f"weighting {type(self.weighting).__name__} probes nothing: {idle} has no effect")
        if self.weighting.sides and (short := sorted({str(p.dtype)[6:] for p in self.params if p.element_size() < 4})):
            self.note(
                f"weights of {', '.join(short)}: a probe's losses are rounded to their precision, by more than most of "
                "them differ; float32 weights under autocast (bf16=True) have them exactly"
            )
        self._top: TopLayers | None = None  # the layers that probes reach, where that is not the whole model
        if self.weighting.sides and self.weighting.layers is not None:
            if self.module is None:
                raise ValueError("layers looks inside the model: DeltaSAM(model, …)")
            try:
                self._top = TopLayers(self.module, self.weighting.layers)
            except DoesNotFit as why:
                self.give_up("layers", why)
        self.singly = False  # exact per-example quantities are taken from passes over single examples
        if self.weighting.exact:
            if self.module is None:
                name = type(self.weighting).__name__
                raise ValueError(f"weighting {name} looks inside the model: DeltaSAM(model, …)")
            self._norms = batch_norms(self.module)
            require_examples_apart(self._norms)
            try:
                PerExampleGradients(self.module, self.params)
            except Unsupported as why:
                self.give_up("at once", why)

    def give_up(self, way: str, why: object) -> None:
        super().give_up(way, why)
        if way == "layers":
            self._top = None
            self.note(f"layers={self.weighting.layers}: {why}: probes of the whole model, which take longer")
        else:
            self.singly = True
            name = type(self.weighting).__name__
            self.note(f"weighting {name} looks at one example at a time, which takes longer: {why}")

    def _find_top(self, step: Step) -> None:
        """Which parameters the top layers have for themselves; once, if the losses show it."""
        if self._top is None or not self._top.unproven or not len(step):
            return
        try:
            self._top.find(lambda: step.aside(0))
        except DoesNotFit as why:
            self.give_up("layers", why)

    @property
    def graphable(self) -> bool:
        known = type(self.weighting) in WEIGHTINGS.values()  # not what others may do there
        return super().graphable and known and not self.singly

    @property
    def local_only(self) -> str:  # type: ignore[override]
        joint = {"cosines", "gram"}.intersection(self.weighting.exact)
        # products with other examples, which a process's own backward pass does not have
        return f"weighting {type(self.weighting).__name__} needs the joint batch's {min(joint)}" if joint else ""

    @property
    def looks_inside(self) -> bool:  # type: ignore[override]
        return bool(self.weighting.exact) or self._top is not None

    @property
    def by_example(self) -> bool:  # type: ignore[override]
        return bool(self.weighting.exact)

    @property
    def whole_only(self) -> str:  # type: ignore[override]
        if self.weighting.exact:
            return f"weighting {type(self.weighting).__name__} looks into the layers; take another, as 'probe'"
        return "probes of the top layers look into them; take layers=None" if self._top is not None else ""

    def ascent(self, step: Step) -> tuple[Tensor, Gradients]:
        of_top = self._top is not None  # on all processes or on none
        self._find_top(step)
        losses, gradient = self._found(step, of_top)
        return losses, step.joint(losses, gradient, weighted=True)

    def _found(self, step: Step, of_top: bool) -> tuple[Tensor, Gradients]:
        """(losses at w (B,), Σ_i p_i g_i), in the way that goes with weighting and model."""
        if self.weighting.exact:
            require_examples_apart(self._norms)
        if self.weighting.exact and not self.singly:
            try:
                return self._exactly_weighted(step)
            except Unsupported as why:  # of the first step that meets it, which begins anew with the same masks
                require_sound(step, why)
                self.give_up("at once", why)
                step.report |= {"forwards": 0.0, "backwards": 0.0}
        try:
            return self._weighted(step, of_top)
        except DoesNotFit as why:  # of a pass unlike those before it; likewise
            if self._top is not None:
                self.give_up("layers", why)
            if not step.alone:  # of the processes only some had drawn a direction, and they share each
                self.generator.manual_seed(self.generator.initial_seed() + 1)
            step.report |= {"forwards": 0.0, "backwards": 0.0}
            return self._weighted(step)

    def _weighted(self, step: Step, of_top: bool = False) -> tuple[Tensor, Gradients]:
        """(losses at w (B,), Σ_i p_i g_i), with a forward pass for the weights and one backward pass. DoesNotFit, on
        all processes alike, where probes were to be `of_top` layers and are not everywhere."""
        hold = len(step) == 1 or not self.recompute
        with step.summing(self.takes_rows()):
            try:
                held, losses, seen = self._passed(step, hold)
            except DoesNotFit:
                step.alike(-1)
                raise
            if of_top and not step.alike(seen[1].dimension):
                raise DoesNotFit("another process's passes do not fit")
            weights = step.weigh(self.weighting, *seen)
            total: list[Tensor | None] | None = None
            start = 0
            for k, piece in enumerate(held):
                if not hold or piece is None:
                    piece = step.losses(k, ascent=True)
                held[k] = None  # its graph is freed by the backward pass
                loss = (piece * weights[start : start + len(piece)]).sum()
                total, _ = step.differentiate(total, loss, step.costs[k])
                start += len(piece)
        assert total is not None
        return losses, step.whole(total, self.takes_rows())

    def _passed(self, step: Step, hold: bool) -> tuple[list[Tensor | None], Tensor, tuple[Tensor, Probe]]:
        """(each piece's losses, with their graphs to `hold`; all of them, detached; what weighs them)."""
        held: list[Tensor | None] = []
        for k in range(len(step)):
            with torch.set_grad_enabled(hold), self._top.record(k) if self._top is not None else nullcontext():
                held.append(step.losses(k, ascent=True))
        losses = torch.cat([piece.detach() for piece in held if piece is not None])
        return held, losses, self._probe(step, losses)

    def _exactly_weighted(self, step: Step) -> tuple[Tensor, Gradients]:
        """As above with exact per-example quantities: one backward pass over the activations serves for the norms and
        for the weighted gradient."""
        assert self.module is not None
        pieces, recorded, scale = [], [], 1.0
        for k in range(len(step)):
            gradients = PerExampleGradients(self.module, self.params)
            with gradients.record():
                found = step.losses(k, ascent=True)
            pieces.append(found.detach())
            scale = scale if k else step.scale_of_one(len(found))
            gradients.backward(found, scale)
            require_own_gradients(step, k, gradients)
            recorded.append(gradients)
            step.report["backwards"] += step.costs[k]
        losses = torch.cat(pieces)
        _, probe = self._probe(step, losses)
        batch = joined(recorded)
        exact = self.weighting.exact
        if "cosines" in exact:
            probe.norms, probe.cosines = norms_and_cosines(*batch.squared_norms_and_mean_dots())
        else:
            probe.norms = batch.squared_norms().sqrt()
        if "gram" in exact:
            probe.gram = batch.gram()
        if "curvature" in exact:
            probe.curvature = torch.cat([self._curvature(step, k, g) for k, g in enumerate(recorded)])
        weights = step.weigh(self.weighting, losses, probe)
        return losses, batch.weighted_gradient(weights, self.takes_rows() and step.rows_suffice())

    def _look_singly(self, step: Step, probe: Probe) -> None:
        """The exact quantities of `probe`, from a pass or more over each example."""
        examples, exact = OneByOne(step), self.weighting.exact
        if "gram" in exact:
            probe.gram = examples.gram()
            probe.norms, probe.cosines = norms_and_cosines(probe.gram.diagonal(), probe.gram.mean(1))
        elif "cosines" in exact:
            probe.norms, probe.cosines = norms_and_cosines(*examples.squared_norms_and_mean_dots())
        else:
            probe.norms = examples.squared_norms().sqrt()
        if "curvature" in exact:
            probe.curvature = examples.curvature()

    def _curvature(self, step: Step, k: int, gradients: PerExampleGradients) -> Tensor:
        def losses() -> Tensor:
            step.report["backwards"] += step.costs[k]
            return step.losses(k, ascent=True)

        return curvature_along_own_gradients(gradients, losses)

    def _require_likelihood(self, step: Step, losses: Tensor) -> None:
        """ValueError where the losses are not those of the logits that the closures keep: cross-entropy, or squared
        error. Looked at in a method's first step; a closure that keeps no logits is taken at its word."""
        if not losses.isfinite().all():  # which the step's end says
            return
        step.checked.add(LIKELIHOOD)
        outputs = [piece.labelled_logits for piece in step.pieces]
        if any(found is None for found in outputs):
            return
        try:
            expected = torch.cat([example_losses(*found) for found in outputs if found is not None])
            alike = torch.allclose(expected.to(losses), losses, rtol=1e-2, atol=1e-3, equal_nan=True)
        except (ValueError, IndexError, RuntimeError):  # labels that only the closure's own losses understand
            alike = False
        if not alike:
            raise ValueError(
                f"weighting {type(self.weighting).__name__} is of cross-entropy (or squared error of one output), and "
                "the closure's losses are others, with class weights or smoothing perhaps: take another weighting"
            )

    def _probe(self, step: Step, losses: Tensor) -> tuple[Tensor, Probe]:
        """(losses at w to compare with, what the probes saw): losses at w ± v for random directions v, same masks."""
        params = self.params
        if self._top is not None:
            above = {id(p) for p in self._top.params or ()}
            params = [p for p in params if id(p) in above]
        probe = Probe(rho=self.rho, radius=self.weighting.radius, dimension=sum(p.numel() for p in params))
        if self.weighting.needs_logits:
            outputs = [found for piece in step.pieces if (found := piece.labelled_logits) is not None]
            if len(outputs) < len(step):
                raise ValueError("this weighting reads the logits: pass dsam.ExampleLosses(model, batch)")
            probe.logits = torch.cat([logits for logits, _ in outputs])
            probe.labels = torch.cat([labels for _, labels in outputs])
        if self.weighting.of_likelihood and LIKELIHOOD not in step.checked:
            self._require_likelihood(step, losses)
        if self.weighting.exact and self.singly:
            self._look_singly(step, probe)
        if not self.weighting.sides:
            return losses, probe
        if step.autocast:
            losses = self._losses(step)  # float32 on both sides of the difference
        plus, minus = [], []
        for _ in range(self.weighting.probes):
            noise, not_drawn = self._noise(params, step)
            scale = self.weighting.radius / (widest(total_norm(noise)).square() + not_drawn).sqrt()
            with step.at(noise, scale, params):
                plus.append(self._losses(step))
            if self.weighting.sides == 2:
                with step.at(noise, -scale, params):
                    minus.append(self._losses(step))
        probe.plus = torch.stack(plus)
        if minus:
            probe.minus = torch.stack(minus)
        if self._top is not None:
            self._top.clear()
        return losses, probe

    @torch.no_grad()
    def _losses(self, step: Step) -> Tensor:
        found, share = [], self._top.share if self._top is not None else 1.0
        # In a bfloat16 training: first differences keep the weights in TF32, second ones do not (docs/speed.md).
        enough = self.weighting.sides == 1 and step.autocast
        for k in range(len(step)):
            with self._top.resume(k) if self._top is not None else nullcontext(), tf32_products(enough):
                found.append(step.losses(k, ascent=True, precise=True, share=share))
        return torch.cat(found)

    def _noise(self, params: list[nn.Parameter], step: Step) -> tuple[list[Tensor], int]:
        """(a random direction in the parameters, of unit variance; how many of its elements are not drawn).

        Of the word embeddings only the rows that the batch looks up are drawn, a sparse tensor: the others change no
        loss, and count with their expected square.
        """
        draw = rademacher if self.weighting.noise == "rademacher" else gaussian
        words, direction, not_drawn = step.words, [], 0
        ids = [piece.word_ids for piece in step.pieces]
        for p in params:
            if words is not None and p is words.weight and None not in ids:
                rows = torch.cat([found.flatten() for found in ids if found is not None]).unique()
                values = draw((len(rows), p.shape[1]), p, self.generator)
                found = torch.sparse_coo_tensor(rows[None], values, p.shape, is_coalesced=True, check_invariants=False)
                not_drawn += p.numel() - values.numel()
            else:
                found = step.placed(draw(p.shape, p, self.generator), p)
            direction.append(found)
        return direction, not_drawn


def gaussian(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent N(0, 1)."""
    return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


def rademacher(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent signs ±1, 64 from each 64-bit draw."""
    n = math.prod(shape)
    draws = torch.empty((n + 63) // 64, dtype=torch.int64, device=like.device).random_(
        -(2**63), None, generator=generator
    )
    places = torch.arange(8, dtype=torch.uint8, device=like.device)
    bits = torch.ones_like(places) << places  # made where they are needed: a list would have to travel there
    signs = (draws.view(torch.uint8)[:, None] & bits != 0).to(like.dtype)
    return signs.mul_(2).sub_(1).flatten()[:n].view(shape)


def norms_and_cosines(squares: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """(‖g_i‖, cosines with the mean gradient g), from ‖g_i‖² and g_i · g; all of shape (B,)."""
    norms, limits = squares.sqrt(), torch.finfo(products.dtype)
    # ‖g‖² = mean_i g_i·g, where it is more than what rounding leaves of gradients that cancel.
    size = torch.maximum(products.mean(), limits.eps * squares.mean()).sqrt()
    return norms, (products / (norms * size).clamp_min(limits.tiny)).clamp(-1, 1)


def curvature_along_own_gradients(
    gradients: PerExampleGradients, losses: Callable[[], Tensor], step: float = 1e-2
) -> Tensor:
    """‖H_i ĝ_i‖, shape (B,), of the examples recorded in `gradients`; `losses()` runs their batch again.

    Central differences of gradients, in two passes over the batch. `step` is their length: long enough for float32,
    whose rounding spoils second differences of losses, of which this takes none.
    """
    norms = gradients.squared_norms().sqrt()
    scales = torch.where(norms == 0, 0, step / norms)
    sides = []
    for sign in (1, -1):
        there = gradients.like()
        with gradients.perturbed(sign * scales):
            with there.record():
                found = losses()
            there.backward(found, gradients.scale)
        sides.append(there)
    ahead, behind = sides
    return ahead.minus(behind).squared_norms().sqrt() / (2 * step)
