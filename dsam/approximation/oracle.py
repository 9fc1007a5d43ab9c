"""Exact per-instance SAM on one batch, and every weighting measured against it."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from ..methods import ExampleLosses, Probe, Weighting
from ..methods.perturbation import perturbed

Params = Sequence[torch.nn.Parameter]


def flat(gradient: Sequence[Tensor | None], params: Params) -> Tensor:
    parts = zip(gradient, params, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in parts])


def shaped(vector: Tensor, params: Params) -> list[Tensor]:
    return [part.view_as(p) for part, p in zip(vector.split([p.numel() for p in params]), params, strict=True)]


def gradient_at(closure: ExampleLosses, params: Params, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(losses (B,), mean gradient (P,)) at w, or at w + step."""
    with perturbed(params, [None] * len(params) if step is None else shaped(step, params)):
        losses = closure()
        gradient = torch.autograd.grad(losses.mean(), params, allow_unused=True)
    return losses.detach(), flat(gradient, params)


class Oracle:
    """One batch at one w, in a model whose dropout is off: all that does not depend on ρ is computed once.

    Holds the B per-example gradients, B × P floats. `curvature` is ‖H_i ĝ_i‖ by a forward difference over the smallest
    ρ, whose per-instance gradients are needed anyway.
    """

    def __init__(self, closure: ExampleLosses, rhos: Sequence[float], radius: float = 0.5, seed: int = 0):
        self.closure, self.rhos = closure, sorted(rhos)
        self.params = [p for p in closure.model.parameters() if p.requires_grad]
        self.size = len(closure)
        self.examples = [trimmed(closure, i) for i in range(self.size)]
        started = time.perf_counter()
        self.losses, self.mean = gradient_at(closure, self.params)
        self.pass_seconds = time.perf_counter() - started
        self.gradients = torch.stack([gradient_at(e, self.params)[1] for e in self.examples])
        self.norms = self.gradients.norm(dim=1)
        self.gram = self.gradients @ self.gradients.T
        self.target, self.own_rise = {}, {}
        for rho in self.rhos:
            target, rises, change = torch.zeros_like(self.mean), [], []
            for example, g, norm, loss in zip(self.examples, self.gradients, self.norms, self.losses, strict=True):
                perturbed_loss, gradient = gradient_at(example, self.params, rho / norm * g)
                target += gradient / self.size
                rises.append(perturbed_loss[0] - loss)
                if rho == self.rhos[0]:
                    change.append((gradient - g).norm() / rho)
            self.target[rho], self.own_rise[rho] = target, torch.stack(rises)
            if change:
                self.curvature = torch.stack(change)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.mean.shape, generator=generator)
        noise *= radius / noise.norm()
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                with perturbed(self.params, shaped(noise, self.params), float(sign)):
                    sides.append(closure()[None])
        self.radius, (self.plus, self.minus) = radius, sides

    def probe(self, rho: float) -> Probe:
        """What a weighting may see, all of it exact but the random probe's losses."""
        return Probe(
            rho=rho,
            radius=self.radius,
            dimension=len(self.mean),
            plus=self.plus,
            minus=self.minus,
            norms=self.norms,
            cosines=self.gradients @ self.mean / (self.norms * self.mean.norm()),
            gram=self.gram,
            curvature=self.curvature,
            logits=self.closure.logits,
            labels=self.closure.labels,
        )

    def measure(self, weightings: Mapping[str, Weighting], headroom: bool = False) -> list[dict]:
        """One row per ρ and weighting, and with `headroom` one for the best weights in hindsight.

        cosine, error: of the gradient at w + ε with the per-instance one, and of their differences to the gradient
        at w (`correction_…`); rise: mean loss rise over the mean per-instance rise; guardedness: over examples, each
        one's rise over its own worst case's; ess: effective sample size.
        """
        products = self._products() if headroom else None
        rows = []
        for rho in self.rhos:
            weights = {name: w(self.losses, self.probe(rho)) for name, w in weightings.items()}
            if products is not None:
                weights["hindsight"] = self._hindsight(products, rho)
            for name, p in weights.items():
                ascent = p.to(self.gradients) @ self.gradients
                losses, gradient = gradient_at(self.closure, self.params, rho / ascent.norm() * ascent)
                rows.append({"rho": rho, "weighting": name} | self._compare(rho, p, losses, gradient))
        return rows

    def _compare(self, rho: float, p: Tensor, losses: Tensor, gradient: Tensor) -> dict[str, float]:
        target, rise = self.target[rho], losses - self.losses
        correction, wanted = gradient - self.mean, target - self.mean
        guardedness = (rise / self.own_rise[rho]).double()
        return {
            "cosine": cosine(gradient, target),
            "error": float((gradient - target).norm() / target.norm()),
            "correction_cosine": cosine(correction, wanted),
            "correction_error": float((correction - wanted).norm() / wanted.norm()),
            "rise": float(rise.mean() / self.own_rise[rho].mean()),
            "guardedness_mean": float(guardedness.mean()),
            "guardedness_median": float(guardedness.median()),
            "guardedness_min": float(guardedness.min()),
            "ess": float(1 / p.double().square().sum()),
            "correction_share": float(wanted.norm() / target.norm()),
        }

    def _products(self) -> Tensor:
        """(B, P): H ĝ_j with H the batch's Hessian, by forward differences over the smallest ρ."""
        rho = self.rhos[0]
        rows = []
        for g, norm in zip(self.gradients, self.norms, strict=True):
            rows.append((gradient_at(self.closure, self.params, rho / norm * g)[1] - self.mean) / rho)
        return torch.stack(rows)

    def _hindsight(self, products: Tensor, rho: float) -> Tensor:
        """Weights p_j ∝ c_j/‖g_j‖ of the non-negative c with Σ c_j H ĝ_j nearest to the per-instance correction / ρ.

        Only the direction of Σ c_j ĝ_j counts, as in a step; its length is left free in the fit.
        """
        wanted = (self.target[rho] - self.mean) / rho
        # Normal equations as a small square-root problem: B columns however many parameters.
        gram = (products @ products.T).double().numpy()
        right = (products @ wanted).double().numpy()
        values, vectors = np.linalg.eigh(gram)
        root = np.sqrt(np.clip(values, 1e-12 * values.max(), None))
        c, _ = nnls(root[:, None] * vectors.T, vectors.T @ right / root)
        c = torch.from_numpy(c).float() / self.norms
        return c / c.sum() if c.sum() > 0 else torch.full_like(c, 1 / self.size)


def trimmed(closure: ExampleLosses, i: int) -> ExampleLosses:
    """Example i alone, without its padding."""
    length = int(closure.inputs["attention_mask"][i].sum())
    batch = {name: value[i : i + 1, :length] for name, value in closure.inputs.items()}
    return ExampleLosses(closure.model, batch | {"labels": closure.labels[i : i + 1]}, closure.autocast)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))
