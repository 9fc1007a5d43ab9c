"""One step over several processes (DistributedDataParallel, Accelerate, torchrun): whose batch does the ascent see?"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import NonFiniteGradient
from ..methods import Closure, Method, Probe, Weighting
from ..methods.perturbation import Gradients
from ..methods.step import Step, count_of

OWN = ("method", "model", "ascent", "group", "sharded")


class Distributed:
    """A method whose step is that of the ranks' batches together; used as the method itself is, but that every
    step waits for the device: the ranks have to agree whether loss and gradient are finite.

        model = DistributedDataParallel(network)
        method = Distributed(DeltaSAM(network, rho=0.05), model)
        loss = method.backward(lambda: per_example_losses(model, batch))   # batch: this rank's part

    Afterwards `.grad` is the same on every rank, and so is the returned loss: the mean over all examples, also where
    the ranks have unequal numbers of them. Every pass runs without DistributedDataParallel's own synchronisation
    (`no_sync`): gradients are reduced here, in each pass over the batch ("global") or once for the step ("local").

    Args:
        method: built on every rank with the same parameters and the same `seed`.
        model: what the closures call; a module that is not a DistributedDataParallel will do as well. One of
            `fully_shard` (FSDP2) has to be given, or the method made of it: then every process holds a part of the
            weights, of the directions and of the gradients, and each rank must have equally many examples.
        ascent: "global": one perturbation for all ranks, from the gradient (and δ-SAM's weights, normalised) over
            the joint batch; equals one process with that batch, but that δ-SAM's probes are other draws of the same
            law there (one process draws only the rows of words that its batch has). "local": each rank ascends on
            its own batch and only the final gradients are averaged: SAM with m = the rank's batch, and one reduction
            less.
        group: the process group, by default all processes.

    Raises:
        ValueError: unknown `ascent`, or one that the method cannot take.
        NonFiniteGradient: in `backward`, on every rank together, when any rank's loss or gradient is not finite.

    Not synchronised: buffers. Batch-norm statistics stay each rank's own (use SyncBatchNorm). With mask="fresh" the
    ascent's masks are drawn from the same seeds on every rank, and so is the noise of FreeLB, R3F and SMART.
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
        from . import sharded  # which stands on what follows here

        self.sharded = sharded.is_sharded(self._whole_model)
        if self.sharded:
            sharded.require_goes_sharded(method, ascent, group)
        if ascent == "global" and method.local_only:
            raise ValueError(
                f"{type(method).__name__} cannot ascend on the joint batch ({method.local_only}); use ascent='local'"
            )

    @property
    def _whole_model(self) -> nn.Module | None:
        return self.model if self.model is not None else self.method.module

    def _step(self, closure: Closure | Sequence[Closure], scaler: torch.amp.GradScaler | None) -> "JointStep":
        if self.sharded:
            from .sharded import ShardedStep

            return ShardedStep(self.method, closure, scaler, group=self.group, model=self._whole_model)
        return (GlobalStep if self.ascent == "global" else LocalStep)(self.method, closure, scaler, group=self.group)

    def __setattr__(self, name: str, value) -> None:
        """What is set is the method's, as what is read is: a schedule of ρ goes on being one."""
        if name in OWN or "method" not in vars(self) or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.method, name, value)

    def __getattr__(self, name: str):
        if name == "method":  # while unpickling or copying, before __init__
            raise AttributeError(name)
        return getattr(self.method, name)

    def backward(self, closure: Closure | Sequence[Closure], scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """As `Method.backward`, for the joint batch."""
        step = self._step(closure, scaler)
        if self.ascent == "global" and self.method.mask == "fresh":
            step.require_equal_pieces()
        try:
            with self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext():
                return self.method.take(step)
        except NonFiniteGradient:
            step.agree(failed=True)
            raise


class JointStep(Step):
    """What the steps of several processes share: reductions."""

    def __init__(self, method: Method, closures, scaler, *, group: dist.ProcessGroup | None = None):
        super().__init__(method, closures, scaler)
        self.group = group
        self.device = self.params[0].device
        self.agreed = False

    def agree(self, failed: bool) -> None:
        """Once a step: NonFiniteGradient on every rank where any has failed."""

    def sum(self, *values: Tensor | float) -> list[Tensor]:
        """Each scalar summed over the ranks, in float64, in one reduction."""
        own = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in values])
        dist.all_reduce(own, group=self.group)
        return list(own)

    def average(self, losses: Tensor) -> Tensor:
        """The mean of all ranks' losses (B,), of which this one may have none."""
        total, count = self.sum(losses.double().sum(), float(len(losses)))
        return (total / count).to(losses.dtype)

    def reduced(self, gradient: Gradients, share: Tensor | float) -> list[Tensor | None]:
        """Σ over ranks of share · gradient; None where no rank has one. One reduction for each dtype."""
        present = self.sum(*(float(g is not None) for g in gradient))
        kept = [
            (torch.zeros_like(p) if g is None else g) if here else None
            for g, p, here in zip(gradient, self.params, torch.stack(present).tolist(), strict=True)
        ]
        for dtype in dict.fromkeys(t.dtype for t in kept if t is not None):  # a set's order is each process's own
            places = [(k, t) for k, t in enumerate(kept) if t is not None and t.dtype == dtype]
            flat = torch.cat([t.flatten() for _, t in places]).mul_(share)
            dist.all_reduce(flat, group=self.group)
            for (k, t), part in zip(places, flat.split([t.numel() for _, t in places]), strict=True):
                kept[k] = part.view_as(t)
        return kept

    def by_size(self, losses: Tensor, gradient: Gradients) -> list[Tensor | None]:
        """The mean of the ranks' gradients, each weighing as many examples as it has."""
        (total,) = self.sum(float(len(losses)))
        return self.reduced(gradient, float(len(losses) / total))

    def gather(self, values: Tensor) -> tuple[Tensor, int]:
        """(all ranks' `values` joined along the last axis, where this rank's part starts)."""
        world, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(world)]
        dist.all_gather(lengths, torch.tensor([values.shape[-1]], device=self.device), group=self.group)
        sizes = [int(n) for n in lengths]
        padded = values.new_zeros(*values.shape[:-1], max(sizes))
        padded[..., : values.shape[-1]] = values
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[..., :n] for part, n in zip(parts, sizes, strict=True)], -1), sum(sizes[:rank])

    def require_equal_pieces(self) -> None:
        # Each piece draws a mask's seed from the generator that also draws the probes, which ranks must share.
        counts, _ = self.gather(torch.tensor([len(self)], device=self.device))
        if len(set(counts.tolist())) > 1:
            raise ValueError(
                f"mask='fresh' and fully_shard need equally many micro-batches on every rank, got {counts.tolist()}"
            )


class GlobalStep(JointStep):
    """Every pass is over the joint batch, so that all ranks see the same gradients and take the same decisions."""

    alone = False

    @cached_property
    def words(self) -> nn.Embedding | None:
        return None  # the ranks' batches differ in their words, but not in their probes; dense gradients are reduced

    def rows_suffice(self) -> bool:
        return False

    def alike(self, value: float) -> bool:
        ends = torch.tensor([value, -value], dtype=torch.float64, device=self.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group)
        return bool(ends[0] == -ends[1])

    def joint(self, losses: Tensor, gradient: Gradients, weighted: bool = False) -> list[Tensor | None]:
        return self.reduced(gradient, 1.0) if weighted else self.by_size(losses, gradient)

    def mean(self, losses: Tensor) -> Tensor:
        return self.average(losses)

    def weigh(self, weighting: Weighting, losses: Tensor, probe: Probe) -> Tensor:
        everyone, start = self.gather(losses)
        seen = {name: getattr(probe, name) for name in ("plus", "minus", "norms", "curvature", "labels", "logits")}
        seen = {name: value for name, value in seen.items() if value is not None}
        for name, value in seen.items():  # the examples are the last axis, except in logits (B, C)
            seen[name] = self.gather(value.mT)[0].mT if name == "logits" else self.gather(value)[0]
        weights = weighting(everyone, replace(probe, **seen))
        self.report_weights(weights)
        return weights[start : start + len(losses)]

    def largest(self, values: Tensor, share: float, less: int = 0) -> Tensor:
        everyone, start = self.gather(values)
        chosen = torch.zeros(len(everyone), dtype=torch.bool, device=everyone.device)
        chosen[everyone.topk(count_of(share, len(everyone), less)).indices] = True
        return chosen[start : start + len(values)]


class LocalStep(JointStep):
    """Each rank computes its own step; what is left in `.grad` is their mean."""

    def agree(self, failed: bool) -> None:
        if not self.agreed:
            self.agreed = True
            (others,) = self.sum(float(failed))
            if others and not failed:
                raise NonFiniteGradient("another rank's loss or gradient is not finite: the step was not taken")

    def mean(self, losses: Tensor) -> Tensor:
        return self.average(losses) if self.agreed else losses.mean()

    def finish(self, losses: Tensor, gradient: Gradients) -> Tensor:
        self.agree(failed=False)
        return super().finish(losses, self.by_size(losses, gradient))
