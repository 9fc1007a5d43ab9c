"""All of a model's weights cast at once for a pass in half precision, in place of one by one where each is used."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Casts(torch.autograd.Function):
    """The tensors in another type, and their gradients in theirs: one operator each way, whatever their number. The
    same numbers, bit for bit, as of autocast, which casts each by itself."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return tuple(_cast(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [k for k, grad in enumerate(grads) if grad is not None]
        found: list[Tensor | None] = [None] * len(grads)
        cast = _cast([grad for grad in grads if grad is not None], [ctx.dtypes[k] for k in there])
        for k, grad in zip(there, cast, strict=True):
            found[k] = grad
        return None, *found


def _cast(tensors: Any, dtypes: list[torch.dtype]) -> list[Tensor]:
    found = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    if found:
        torch._foreach_copy_(found, list(tensors))
    return found


class CastAtOnce:
    """Has a model's linear layers meet their weights and biases cast at once, wherever its forward runs in autocast.

        CastAtOnce(model)

    Autocast launches a cast for each of them in each pass, and one for the gradient of each: 296 for BERT-base, of
    about 1,400 operators (tests/test_counts.py). Here it is two for each layer of the network: by layer, so that a
    gradient that ends at the top layers casts no others'. What does not go through the model's own `forward`, or runs
    again for a checkpointed layer, is autocast's as before. Frozen parameters are too, and those that are not float32.
    """

    def __init__(self, model: nn.Module):
        self.groups: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
        for name, module in model.named_modules():
            if type(module).forward is nn.Linear.forward and "forward" not in vars(module):
                parts = name.split(".")
                depth = next((k for k, part in enumerate(parts) if part.isdigit()), -1)
                group = self.groups[".".join(parts[: depth + 1])]
                group += [(module, which) for which in ("weight", "bias") if module._parameters[which] is not None]
                module.forward = CastLinear(module, self)  # type: ignore[assignment]
        self.now: dict[int, Tensor] = {}
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, model: nn.Module, args: tuple) -> None:
        for members in self.groups.values():
            found = {id(p): p for module, which in members if (p := module._parameters[which]) is not None}
            device = next(iter(found.values())).device.type
            if not torch.is_autocast_enabled(device):
                return
            params = [p for p in found.values() if p.requires_grad and p.dtype == torch.float32]
            if params:
                cast = Casts.apply(torch.get_autocast_dtype(device), *params)
                self.now |= dict(zip(map(id, params), cast, strict=True))

    def _end(self, *_: Any) -> None:
        self.now.clear()


class CastLinear:
    """The forward of a linear layer, with those of its parameters that are cast already."""

    def __init__(self, module: nn.Module, casts: CastAtOnce):
        self.module, self.casts = module, casts

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.module._parameters["weight"], self.module._parameters["bias"]
        assert weight is not None
        now = self.casts.now
        if not now or not torch.is_autocast_enabled(weight.device.type):  # as where a module turns autocast off
            return F.linear(x, weight, bias)
        return F.linear(x, now.get(id(weight), weight), bias if bias is None else now.get(id(bias), bias))
