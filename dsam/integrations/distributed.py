"""One step over several processes (DistributedDataParallel, Accelerate, torchrun): whose batch does the ascent see?"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import NonFiniteGradient
from ..methods import SAM, DeltaSAM, Method, Probe
from ..methods.base import Closure
from ..methods.perturbation import Gradients, total_norm


class Distributed:
    """A method whose step is that of the ranks' batches together; used as the method itself is.

        model = DistributedDataParallel(network)
        method = Distributed(DeltaSAM(network, rho=0.05), model)
        loss = method.backward(lambda: per_example_losses(model, batch))   # batch: this rank's part

    Afterwards `.grad` is the same on every rank, and so is the returned loss: the mean over all examples, also where
    the ranks have unequal numbers of them. Every pass runs without DistributedDataParallel's own synchronisation
    (`no_sync`): gradients are reduced here, once for the ascent ("global" only) and once for the step.

    Args:
        method: built on every rank with the same parameters and the same `seed`.
        model: what the closures call; a module that is not a DistributedDataParallel will do as well.
        ascent: "global": one perturbation for all ranks, from the gradient (and δ-SAM's weights, normalised) over
            the joint batch; equals one process with that batch. "local": each rank ascends on its own batch and only
            the final gradients are averaged: SAM with m = the rank's batch, and one reduction less.
        group: the process group, by default all processes.

    Raises:
        ValueError: unknown `ascent`, or one that the method cannot take.
        NonFiniteGradient: in `backward`, on every rank together, when any rank's loss or gradient is not finite.

    Not synchronised: buffers. Batch-norm statistics stay each rank's own (use SyncBatchNorm). With mask="fresh" the
    ascent's masks are drawn from the same seeds on every rank.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module | None = None,
        *,
        ascent: str = "global",
        group: dist.ProcessGroup | None = None,
    ):
        if ascent not in ("global", "local"):
            raise ValueError(f"ascent must be 'global' or 'local', got {ascent!r}")
        if not dist.is_initialized():
            raise ValueError("several processes need torch.distributed.init_process_group first (torchrun, Accelerate)")
        self.method, self.model, self.ascent, self.group = method, model, ascent, group
        self.device = method.params[0].device
        if ascent == "global" and type(method)._backward is not Method._backward:
            if not _ascends_once(method):
                raise ValueError(f"{type(method).__name__} cannot ascend on the joint batch; use ascent='local'")
            if isinstance(method, DeltaSAM):
                joint_only = {"cosines", "gram"}.intersection(method.weighting.exact)
                if joint_only:  # products with other examples, which a rank's own backward pass does not have
                    name, needs = type(method.weighting).__name__, ", ".join(sorted(joint_only))
                    raise ValueError(f"weighting {name} needs the joint batch's {needs}; use ascent='local'")
                method.weighting = _JointWeighting(method.weighting, self)
            method.ranks = self

    def __getattr__(self, name: str):
        if name == "method":  # while unpickling or copying, before __init__
            raise AttributeError(name)
        return getattr(self.method, name)

    def backward(self, closure: Closure | Sequence[Closure], scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """As `Method.backward`, for the joint batch."""
        method = self.method
        closures = [closure] if callable(closure) else list(closure)
        if self.ascent == "global" and method.mask == "fresh":
            self._require_equal_pieces(len(closures))
        earlier = [p.grad for p in method.params]
        for p in method.params:
            p.grad = None
        loss, failure = torch.full((), torch.nan, device=self.device), None
        try:
            with self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext():
                loss = method.backward(closures, scaler)
        except NonFiniteGradient as error:
            failure = error
        if isinstance(getattr(method, "weighting", None), _JointWeighting) and method.weighting.joint is not None:
            weights = method.weighting.joint
            method.report |= {"effective_sample_size": 1 / weights.square().sum(), "largest_weight": weights.max()}
        try:
            return self._reduce(loss, sum(method._sizes), failure, scaler)
        except NonFiniteGradient:
            for p in method.params:
                p.grad = None
            raise
        finally:
            for p, grad in zip(method.params, earlier, strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else grad.add_(p.grad)

    def _reduce(self, loss: Tensor, size: int, failure: NonFiniteGradient | None, scaler) -> Tensor:
        """Joint loss; makes every rank's `.grad` the joint gradient. One small reduction agrees on all it needs."""
        method = self.method
        present = [p.grad is not None for p in method.params]
        facts = [float(failure is not None), float(size), *map(float, present)]
        facts = torch.tensor(facts, dtype=torch.float64, device=self.device)
        facts = torch.cat([facts, (loss.double() * size).reshape(1)])
        dist.all_reduce(facts, group=self.group)
        failed, total, *present, loss_sum = facts.tolist()
        if failed:
            raise failure or NonFiniteGradient("another rank's loss or gradient is not finite: the step was not taken")
        gradient = [p.grad for p in method.params]
        for p, grad in zip(
            method.params, self._weighted_sum(gradient, method.params, size / total, present), strict=True
        ):
            p.grad = grad
        if scaler is None:
            method.report["gradient_norm"] = total_norm([p.grad for p in method.params])
        return torch.tensor(loss_sum / total, dtype=loss.dtype, device=self.device)

    def joint(
        self, loss: Tensor, gradient: Gradients, params: Sequence[nn.Parameter], size: int
    ) -> tuple[Tensor, list[Tensor | None]]:
        """(mean loss, ascent gradient) over the joint batch, from this rank's over `size` examples."""
        facts = [float(size), *(float(g is not None) for g in gradient)]
        facts = torch.tensor(facts, dtype=torch.float64, device=self.device)
        facts = torch.cat([facts, (loss.double() * size).reshape(1)])
        dist.all_reduce(facts, group=self.group)
        total, *present, loss_sum = facts.tolist()
        loss = torch.tensor(loss_sum / total, dtype=loss.dtype, device=self.device)
        return loss, self._weighted_sum(gradient, params, size / total, present)

    def _weighted_sum(
        self, tensors: Gradients, like: Sequence[Tensor], share: float, present: Sequence[float]
    ) -> list[Tensor | None]:
        """Σ over ranks of share · tensors; None where no rank has one. One reduction for each dtype."""
        kept = [
            (torch.zeros_like(p) if t is None else t) if here else None
            for t, p, here in zip(tensors, like, present, strict=True)
        ]
        for dtype in {t.dtype for t in kept if t is not None}:
            places = [k for k, t in enumerate(kept) if t is not None and t.dtype == dtype]
            flat = torch.cat([kept[k].flatten() for k in places]).mul_(share)
            dist.all_reduce(flat, group=self.group)
            for k, part in zip(places, flat.split([kept[k].numel() for k in places]), strict=True):
                kept[k] = part.view_as(kept[k])
        return kept

    def gather(self, values: Tensor) -> tuple[Tensor, int]:
        """(all ranks' `values` joined along the last axis, where this rank's part starts)."""
        world, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(world)]
        dist.all_gather(sizes, torch.tensor([values.shape[-1]], device=self.device), group=self.group)
        sizes = [int(s) for s in sizes]
        padded = values.new_zeros(*values.shape[:-1], max(sizes))
        padded[..., : values.shape[-1]] = values
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[..., :n] for part, n in zip(parts, sizes, strict=True)], -1), sum(sizes[:rank])

    def _require_equal_pieces(self, pieces: int) -> None:
        # Each piece draws a mask's seed from the generator that also draws the probes, which ranks must share.
        counts, _ = self.gather(torch.tensor([pieces], device=self.device))
        if len(set(counts.tolist())) > 1:
            raise ValueError(f"mask='fresh' needs equally many micro-batches on every rank, got {counts.tolist()}")


def _ascends_once(method: Method) -> bool:
    """Is all that the method does with the batch one ascent gradient, which can be summed over ranks?"""
    kind = type(method)
    return (
        kind._backward is SAM._backward
        and kind._descend is Method._descend
        and kind._ascent_gradient in (SAM._ascent_gradient, DeltaSAM._ascent_gradient)
    )


class _JointWeighting:
    """A weighting that sees the joint batch and answers with this rank's part of the weights."""

    def __init__(self, weighting, ranks: Distributed):
        self.weighting, self.ranks = weighting, ranks
        self.joint: Tensor | None = None  # the latest weights of the joint batch

    def __getattr__(self, name: str):
        if name == "weighting":
            raise AttributeError(name)
        return getattr(self.weighting, name)

    def __call__(self, losses: Tensor, probe: Probe) -> Tensor:
        everyone, start = self.ranks.gather(losses)
        seen = {name: getattr(probe, name) for name in ("plus", "minus", "norms", "curvature", "labels", "logits")}
        seen = {name: value for name, value in seen.items() if value is not None}
        for name, value in seen.items():  # the examples are the last axis, except in logits (B, C)
            seen[name] = self.ranks.gather(value.mT)[0].mT if name == "logits" else self.ranks.gather(value)[0]
        self.joint = self.weighting(everyone, replace(probe, **seen))
        # `Distributed.joint` averages the ranks' gradients by size: scaled like this, their average is Σ p_i g_i.
        return self.joint[start : start + len(losses)] * (len(everyone) / len(losses))
