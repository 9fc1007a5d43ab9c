"""One step where each process holds a part of the weights: FSDP2, `torch.distributed.fsdp.fully_shard`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..methods import Method
from ..methods.perturbation import Gradients
from .distributed import GlobalStep


def is_sharded(model: nn.Module | None) -> bool:
    return model is not None and any(isinstance(module, FSDPModule) for module in model.modules())


def require_goes_sharded(method: Method, ascent: str, group: dist.ProcessGroup | None) -> None:
    """ValueError for a method, an ascent or weights that do not go with `fully_shard`."""
    name, why = type(method).__name__, method.whole_only or method.local_only
    if why:
        raise ValueError(f"{name} does not go with fully_shard: {why}")
    if ascent == "local":
        raise ValueError("fully_shard leaves no process a gradient of its own batch: use ascent='global'")
    if not all(isinstance(p, DTensor) for p in method.params):
        raise ValueError("some of the method's parameters are not sharded: make the method after fully_shard(model)")
    processes = dist.get_world_size(group)
    if any(p.device_mesh.size() != processes for p in method.params if isinstance(p, DTensor)):
        raise ValueError(
            f"the parameters are sharded over other than the {processes} processes that share a batch: the method goes "
            "with fully_shard over all of them, without tensor parallelism"
        )


class ShardedStep(GlobalStep):
    """The joint batch's step on parameters that are shards (DTensor), and so are directions and gradients.

    FSDP2 knows the shards' gradient only by `backward()`, which averages it over the processes; each has to have
    equally many micro-batches and examples. The shards are moved in place, since the whole weights are gathered from
    them, and put back from copies.
    """

    def __init__(self, method: Method, closures, scaler, *, group: dist.ProcessGroup | None, model: nn.Module):
        super().__init__(method, closures, scaler, group=group)
        self.model = model
        self._gather_anew()
        self._leaves = list(model.parameters())  # now, when they are the shards
        self.require_equal_pieces()

    def grad(self, loss: Tensor, of: Sequence[Tensor]) -> Sequence[Tensor | None]:
        leaves = [*self._leaves, *(x for x in of if not isinstance(x, DTensor))]
        earlier = [x.grad for x in leaves]
        try:
            for x in leaves:
                x.grad = None
            loss.backward()
            return [x.grad for x in of]
        finally:
            for x, g in zip(leaves, earlier, strict=True):
                x.grad = g

    def joint(self, losses: Tensor, gradient: Gradients, weighted: bool = False) -> list[Tensor | None]:
        counts, _ = self.gather(torch.tensor([len(losses)], device=self.device))
        if len(set(counts.tolist())) > 1:
            raise ValueError(f"fully_shard needs equally many examples on every rank, got {counts.tolist()}")
        return [g if g is None or not weighted else g * len(counts) for g in gradient]

    def placed(self, whole: Tensor, like: nn.Parameter) -> Tensor:
        assert isinstance(like, DTensor)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # all have drawn it

    @contextmanager
    def at(
        self, direction: Gradients, scale: Tensor | float, params: Sequence[nn.Parameter] | None = None
    ) -> Iterator[None]:
        pairs = zip(self.params if params is None else params, direction, strict=True)
        with torch.no_grad():
            moved = [(_local(p), _local(d)) for p, d in pairs if d is not None]
            before = [w.clone() for w, _ in moved]
        try:
            for w, d in moved:
                w.add_(d * scale)
            self._gather_anew()
            yield
        finally:
            for (w, _), b in zip(moved, before, strict=True):
                w.copy_(b)
            self._gather_anew()

    def _gather_anew(self) -> None:
        """Some modules keep their whole weights after a forward pass, which are then no longer those of the shards."""
        torch.clear_autocast_cache()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _local(x: Tensor) -> Tensor:
    """This process's part."""
    assert isinstance(x, DTensor)
    return x.to_local()
