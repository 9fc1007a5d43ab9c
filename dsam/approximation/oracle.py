"""Exact per-instance SAM on one batch, and every weighting measured against it."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor, nn

from ..methods import ExampleLosses, Probe, Weighting
from ..methods.delta_sam import curvature_along_own_gradients
from ..methods.gradients import inner_product
from ..methods.layers import DoesNotFit, TopLayers
from ..methods.per_example import PerExampleGradients
from ..methods.perturbation import Gradients, perturbed, total_norm


class Oracle:
    """One batch at one w, in a model whose dropout is off: all that does not depend on ρ is computed once.

    The per-instance gradients come from two batched passes (`PerExampleGradients.perturbed`); no example's gradient
    is formed. Word embeddings that the batch does not use are left out while measuring: their gradients and
    perturbations are zero.

    Args:
        closure: the batch.
        rhos: radii, > 0.
        parts: its examples' indices cut so that little is padding, for the passes that are taken once per weighting.
        radius: norm of the random probe, over the model or the layers probed.
        wrong: which of its examples have a wrong label, (B,), where that is known.
    """

    def __init__(
        self,
        closure: ExampleLosses,
        rhos: Sequence[float],
        parts: Sequence[Sequence[int]] | None = None,
        radius: float = 0.5,
        seed: int = 0,
        wrong: Tensor | None = None,
    ):
        self.wrong = wrong
        self.rhos, self.size = sorted(rhos), len(closure)
        self.dimension = sum(p.numel() for p in closure.model.parameters() if p.requires_grad)
        self.closure = closure = with_used_words(closure)
        self.params = [p for p in closure.model.parameters() if p.requires_grad]
        self.parts = [trimmed(closure, part) for part in parts] if parts is not None else [closure]
        self.order = torch.tensor([i for part in parts for i in part]) if parts is not None else torch.arange(self.size)
        self.examples = PerExampleGradients(closure.model, self.params)
        with self.examples.record():
            losses = closure()
        self.examples.backward(losses)
        self.logits, self.losses = closure.logits, losses.detach()
        self.norms = self.examples.squared_norms().sqrt()
        self.gram = self.examples.gram()
        self.mean = self.examples.weighted_gradient(self.uniform)
        self.cosines = self.gram.mean(1) / (self.norms * total_norm(self.mean))
        self.curvature = curvature_along_own_gradients(self.examples, closure)
        self.target, self.wanted, self.own_rise = {}, {}, {}
        for rho in self.rhos:
            with self.examples.perturbed(rho / self.norms):
                worst, self.target[rho] = self._gradient([closure])
            self.wanted[rho] = torch._foreach_sub(self.target[rho], self.mean)  # the correction
            self.own_rise[rho] = worst - self.losses
        self.radius, self.seed = radius, seed
        self._probed: dict[int | None, tuple[Tensor, Tensor]] = {}

    @property
    def uniform(self) -> Tensor:
        return torch.full_like(self.losses, 1 / self.size)

    def _sides(self, layers: int | None) -> tuple[Tensor, Tensor]:
        """Losses (1, B) at w + v and w − v, v in the whole model or in its top layers; the same v each time."""
        if layers not in self._probed:
            generator = torch.Generator().manual_seed(self.seed)
            noise: list[Tensor | None] = [torch.randn(p.shape, generator=generator).to(p) for p in self.params]
            dimension = self.dimension
            if layers is not None:
                above = self._above(layers)
                noise = [v if id(p) in above else None for p, v in zip(self.params, noise, strict=True)]
                dimension = sum(v.numel() for v in noise if v is not None)
            sides = []
            for sign in (1, -1):
                # Of norm `radius` over what is probed, words that do not occur here included.
                with torch.no_grad(), perturbed(self.params, noise, sign * self.radius / dimension**0.5):
                    sides.append(self._losses()[None])
            self._probed[layers] = sides[0], sides[1]
        return self._probed[layers]

    def _above(self, layers: int) -> set[int]:
        """Ids of the parameters that are the top layers' own; of all, where the model has no such layers."""
        try:
            top = TopLayers(self.closure.model, layers)
            top.find(self.closure)
        except DoesNotFit:
            return set(map(id, self.params))
        return set(map(id, top.params or ()))

    def probe(self, rho: float, layers: int | None = None) -> Probe:
        """What a weighting may see, all of it exact but the random probe's losses."""
        plus, minus = self._sides(layers)
        return Probe(
            rho=rho,
            radius=self.radius,
            dimension=self.dimension,
            plus=plus,
            minus=minus,
            norms=self.norms,
            cosines=self.cosines,
            gram=self.gram,
            curvature=self.curvature,
            logits=self.logits,
            labels=self.closure.labels,
        )

    def measure(self, weightings: Mapping[str, Weighting], headroom: bool = False) -> list[dict]:
        """One row per ρ and weighting, and with `headroom` for the best weights in hindsight, of both kinds.

        cosine, error: of the gradient at w + ε with the per-instance one, and of their differences to the gradient
        at w (`correction_…`); rise: mean loss rise over the mean per-instance rise; guardedness: over examples, each
        one's rise over its own worst case's; ess: effective sample size. Where wrong labels are known, `wrong`, their
        share of the batch, `wrong_weight`, of the weights p, and `wrong_pull`, of Σ p_i‖g_i‖.
        """
        fits = self._fits() if headroom else {}
        rows = []
        for name in [*weightings, *(HINDSIGHT if headroom else [])]:
            p = ascent = None
            for rho in self.rhos:
                if name in weightings:
                    new = weightings[name](self.losses, self.probe(rho, weightings[name].layers))
                else:
                    new = self._weights(HINDSIGHT[name](*fits[rho]))
                if p is None or not torch.equal(new, p):  # most weights do not depend on ρ
                    p, ascent = new, self.examples.weighted_gradient(new.to(self.losses))
                with perturbed(self.params, ascent, float(rho / total_norm(ascent))):
                    losses, gradient = self._gradient(self.parts, self.order)
                rows.append({"rho": rho, "weighting": name} | self._compare(rho, p, losses, gradient))
        return rows

    def _gradient(self, parts: list[ExampleLosses], order: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """(losses (B,), gradient of their mean) over the parts, which hold the examples `order`."""
        for p in self.params:
            p.grad = None
        seen = []
        for part in parts:
            losses = part()
            (losses.sum() / self.size).backward()
            seen.append(losses.detach())
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        return self._in_order(torch.cat(seen), order), gradient

    def _losses(self) -> Tensor:
        return self._in_order(torch.cat([part() for part in self.parts]), self.order)

    @staticmethod
    def _in_order(losses: Tensor, order: Tensor | None) -> Tensor:
        return losses if order is None else torch.empty_like(losses).index_copy(0, order.to(losses.device), losses)

    def _compare(self, rho: float, p: Tensor, losses: Tensor, gradient: list[Tensor]) -> dict[str, float]:
        """`gradient` is overwritten: with millions of numbers new memory costs more than the arithmetic."""
        target, wanted = self.target[rho], self.wanted[rho]
        rise = losses - self.losses
        guardedness = (rise / self.own_rise[rho]).double()
        near = cosine(gradient, target)
        torch._foreach_sub_(gradient, target)
        distance = total_norm(gradient)  # of the gradients, and so of the corrections
        torch._foreach_add_(gradient, wanted)  # now the correction: gradient − mean
        return {
            "cosine": near,
            "error": float(distance / total_norm(target)),
            "correction_cosine": cosine(gradient, wanted),
            "correction_error": float(distance / total_norm(wanted)),
            "rise": float(rise.mean() / self.own_rise[rho].mean()),
            "guardedness_mean": float(guardedness.mean()),
            "guardedness_median": float(guardedness.median()),
            "guardedness_min": float(guardedness.min()),
            "ess": float(1 / p.double().square().sum()),
            "correction_share": float(total_norm(wanted) / total_norm(target)),
        } | self._of_wrong(p)

    def _of_wrong(self, p: Tensor) -> dict[str, float]:
        if self.wrong is None:
            return {}
        wrong, pull = self.wrong.to(p.device).double(), p.double() * self.norms
        return {
            "wrong": float(wrong.mean()),
            "wrong_weight": float(p.double() @ wrong),
            "wrong_pull": float(pull @ wrong / pull.sum()),
        }

    def _products(self) -> Tensor:
        """(B, P): H ĝ_j with H the batch's Hessian, by forward differences over the smallest ρ."""
        rho, rows = self.rhos[0], []
        for one in torch.eye(self.size).to(self.losses):
            g = self.examples.weighted_gradient(one)
            with perturbed(self.params, g, float(rho / total_norm(g))):
                rows.append(flat(torch._foreach_sub(self._gradient(self.parts)[1], self.mean)) / rho)
        return torch.stack(rows)

    def _fits(self) -> dict[float, tuple[np.ndarray, ...]]:
        """For each ρ what the fits in hindsight take: the inner products of the H ĝ_j with each other (B, B) and with
        the per-instance correction / ρ (B,), those of the ĝ_j (B, B), and the c of uniform weights (B,)."""
        products = self._products()
        each = (products @ products.T).double().cpu().numpy()
        unit = (self.gram / torch.outer(self.norms, self.norms)).double().cpu().numpy()
        wanted = {rho: (products @ flat(self.wanted[rho])).double().cpu().numpy() / rho for rho in self.rhos}
        sam = self.norms.double().cpu().numpy()
        return {rho: (each, right, unit, sam) for rho, right in wanted.items()}

    def _weights(self, c: np.ndarray) -> Tensor:
        """p_j ∝ c_j/‖g_j‖, so that Σ p_j g_j points along Σ c_j ĝ_j."""
        p = torch.from_numpy(c).to(self.norms) / self.norms
        return p / p.sum() if p.sum() > 0 else self.uniform


def best_direction(each: np.ndarray, right: np.ndarray, *_) -> np.ndarray:
    """The c ≥ 0 whose Σ c_j H ĝ_j is nearest to the per-instance correction / ρ: non-negative least squares.

    Its length is free in the fit, so that these are the weights whose correction has the best direction.
    """
    # Normal equations as a small square-root problem: B columns however many parameters.
    values, vectors = np.linalg.eigh(each)
    root = np.sqrt(np.clip(values, 1e-12 * values.max(), None))
    return nnls(root[:, None] * vectors.T, vectors.T @ right / root)[0]


def best_step(each: np.ndarray, right: np.ndarray, unit: np.ndarray, sam: np.ndarray) -> np.ndarray:
    """The c ≥ 0 whose H Σ c_j ĝ_j / ‖Σ c_j ĝ_j‖ is nearest to the per-instance correction / ρ.

    The length is that of a step, ρ: to first order these are the weights whose gradient has the least error. The
    best local minimum from several starts, SAM's own c among them, on which this fit can therefore only gain: the error
    itself may be less with others, the more the longer the step (docs/approximation.md).
    """
    scale = np.trace(each)  # L-BFGS-B's tolerances are absolute, and losses may be of any size
    if scale > 0:
        each, right = each / scale, right / scale

    def error(c: np.ndarray) -> tuple[float, np.ndarray]:
        square = c @ unit @ c
        if square < 1e-12:  # of entries at most about 1: no direction to step along
            return 1e9 * np.trace(each), np.zeros(size)
        along, across = right @ c / square**0.5, c @ each @ c / square
        slope = (each @ c - across * (unit @ c)) / square - right / square**0.5 + along * (unit @ c) / square
        return across - 2 * along, 2 * slope

    size = len(right)
    starts = [sam, np.ones(size), best_direction(each, right) + 1e-3, *(np.eye(size) + 0.1)]
    found = [minimize(error, c / c.max(), jac=True, method="L-BFGS-B", bounds=[(0, None)] * size) for c in starts]
    return min(found, key=lambda result: result.fun).x


HINDSIGHT = {"hindsight (direction)": best_direction, "hindsight (step)": best_step}
"""Weights that know the answer, by what they fit."""


def with_used_words(closure: ExampleLosses) -> ExampleLosses:
    """The same losses from a copy of the model that shares its weights but holds only the word embeddings in use; from
    the model itself where its table does more than look up, as Gemma's and BioGPT's, which scale."""
    whole = closure.model.get_input_embeddings()
    if type(whole) is not nn.Embedding or whole.max_norm is not None or whole.scale_grad_by_freq:
        return closure
    used = closure.inputs["input_ids"].unique()
    # Words that stand for padding keep a zero gradient by being told apart, as in the whole table.
    padding = (used == whole.padding_idx).nonzero().flatten().tolist() if whole.padding_idx is not None else []
    words = nn.Embedding(
        len(used),
        whole.embedding_dim,
        padding_idx=padding[0] if padding else None,
        _weight=whole.weight.detach()[used],
        device=used.device,
    ).requires_grad_(whole.weight.requires_grad)
    # The ids themselves stay, since RoBERTa counts its positions by them.
    words.register_forward_pre_hook(lambda _, ids: (torch.searchsorted(used, ids[0].contiguous()),))
    kept: dict[int, object] = {id(p): p for p in closure.model.parameters()}
    model = copy.deepcopy(closure.model, kept | {id(whole): words})
    return ExampleLosses(model, closure.inputs | {"labels": closure.labels}, closure.autocast)


def trimmed(closure: ExampleLosses, indices: Sequence[int]) -> ExampleLosses:
    """Some of the examples, without the columns that are padding in all of them, on whichever side these stand."""
    part = closure.subset(list(indices))
    used = part.inputs["attention_mask"].any(0)
    batch = {name: value[:, used] for name, value in part.inputs.items()} | {"labels": part.labels}
    return ExampleLosses(part.model, batch, part.autocast)


def flat(gradient: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient])


def cosine(a: Gradients, b: Gradients) -> float:
    return float(inner_product(a, b) / (total_norm(a) * total_norm(b)))
