"""The meta device in a GPU's place: finds tensors of two devices that meet, and counts what would make the host wait.

Nothing is computed: what a step needs as a number (float(), bool(), int(), unique, nonzero) is answered with something
plausible, and counted with the line that asked. Not seen: autocast, a GPU's random states, values.
"""

import collections
import contextlib
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsam

GPU = torch.device("meta")
aten = torch.ops.aten
MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten._index_put_impl_.default}
MAY_MIX |= {aten.index_put_.default}


def asking_line() -> str:
    ours = [f for f in traceback.extract_stack() if dsam.__path__[0] in f.filename or "/transformers/" in f.filename]
    where = ours[-1]
    return f"{'/'.join(where.filename.split('/')[-2:])}:{where.lineno} {where.line}"


class Host(TorchDispatchMode):
    """Answers what depends on data, and counts in `waits` who asked."""

    def __init__(self):
        super().__init__()
        self.waits: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        on_gpu = x is not None and x.device.type == "meta"
        if func is aten._local_scalar_dense.default and on_gpu:
            self.note("a number")
            return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1
        if func in (aten._unique2.default, aten.unique_dim.default) and on_gpu:
            self.note("unique")
            flat = x.reshape(-1)
            return flat.clone(), torch.zeros_like(x, dtype=torch.int64), torch.zeros_like(flat, dtype=torch.int64)
        if func is aten.nonzero.default and on_gpu:
            self.note("nonzero")
            return torch.zeros(x.numel(), x.dim(), dtype=torch.int64, device=x.device)
        if func is aten.equal.default and on_gpu:
            self.note("equal")
            return False
        if func is aten._to_copy.default and on_gpu and torch.device(kwargs.get("device") or GPU).type == "cpu":
            self.note("a copy to the host")
            return torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)
        if func is aten._to_copy.default and not on_gpu and torch.device(kwargs.get("device") or "cpu") == GPU:
            self.note("a copy from pageable memory")
        if func is aten._coalesce.default and on_gpu:
            self.note("coalesce")
            return torch.sparse_coo_tensor(x._indices(), x._values(), x.shape, is_coalesced=True)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t for t in tensors if t.device.type == "meta"]
        here = [t for t in tensors if t.device.type == "cpu" and (t.dim() or "foreach" in str(func))]
        if there and here and func not in MAY_MIX:
            raise RuntimeError(
                f"tensors of two devices meet in {func}: {tuple(there[0].shape)}, {tuple(here[0].shape)}"
            )
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.note("a boolean index")
            return x.clone() if len(args[1]) == 1 else func(*args, **kwargs)
        return func(*args, **kwargs)

    def note(self, what: str) -> None:
        self.waits[f"{what}: {asking_line()}"] += 1


class Generator:
    """Stands in for torch.Generator("meta"), which there is not: draws of nothing need none."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)

    def manual_seed(self, seed):
        return self

    def get_state(self):
        return torch.zeros(16, dtype=torch.uint8, device="cpu")

    def set_state(self, state):
        assert state.device.type == "cpu", f"the state of a generator on {state.device}"


def as_a_gpu(monkeypatch, host: Host) -> None:
    """For one test: generators and lists of numbers as a GPU has them."""

    def without_generator(draw):
        def drawn(*args, generator=None, **kwargs):
            device = torch.device(kwargs.get("device") or "cpu").type
            if generator is not None and device != generator.device.type:
                raise RuntimeError(f"Expected a '{device}' device type for generator but found '{generator.device}'")
            return draw(*args, **kwargs)

        return drawn

    for name in ("randn", "rand", "randint", "randperm"):
        monkeypatch.setattr(torch, name, without_generator(getattr(torch, name)))
    random_, tolist = torch.Tensor.random_, torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "random_", lambda x, *a, generator=None, **k: random_(x, *a, **k))
    monkeypatch.setattr(torch, "Generator", Generator)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, *a, **k: autocast("cpu" if kind == "meta" else kind, *a, **k))

    def listed(x):
        if x.device.type != "meta":
            return tolist(x)
        host.note("a list")
        return tolist(torch.ones(x.shape, dtype=x.dtype))

    monkeypatch.setattr(torch.Tensor, "tolist", listed)


@contextlib.contextmanager
def watched(host: Host):
    with host:
        yield
