"""Which of a model's modules `per_example` has formulas for, found by what they compute, not by their names alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from .casts import CastLinear
from .gradients import wide

LINEAR, NORM, GROUP_NORM, EMBEDDING = nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Embedding
CONVOLUTION = "convolution"
"""A Conv1d or Conv2d: a linear layer whose tokens are the output's positions, and whose inputs are their patches."""
TURNED = "turned"
"""A linear layer whose weight is (in, out): GPT-2's Conv1D."""
SCALE = "scale"
"""f(x) · weight + bias by elements of the last axis, f without parameters: RMSNorm and its relatives."""
LOOKUP = "lookup"
"""An embedding with a forward of its own, which looks rows up as embeddings do: BART's and OPT's positions."""
CHANNELS_FIRST = (CONVOLUTION, GROUP_NORM)
BARE = "bare"
"""Not a layer: a parameter that a module uses by itself, the same for all examples (`Bare`)."""
_found: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()


def kind_of(module: nn.Module) -> object:
    """One of the constants above, or None for what is none of them or owns something else."""
    if isinstance(module, Bare):
        return BARE
    own = dict(module.named_parameters(recurse=False))
    if not own or not own.keys() <= {"weight", "bias"} or getattr(module, "scale_grad_by_freq", False):
        return None
    if getattr(module, "max_norm", None) is not None:  # its rows are clipped as they are looked up
        return None
    # With a forward of its own (a mask, an adapter) a module is not the layer that the formulas are for; nor a subclass
    own_forward = vars(module).get("forward", vars(module).get("_conv_forward"))
    if own_forward is not None and not isinstance(own_forward, CastLinear):
        return None
    for kind in (LINEAR, NORM, GROUP_NORM, EMBEDDING):
        if type(module).forward is kind.forward:
            return kind
    for conv in (nn.Conv1d, nn.Conv2d):
        if type(module).forward is conv.forward and type(module)._conv_forward is conv._conv_forward:  # type: ignore[attr-defined]
            return CONVOLUTION
    if isinstance(module, EMBEDDING):
        return LOOKUP
    if module not in _found:
        _found[module] = _tried(module, own)
    return _found[module]


def tokens(module: nn.Module, y: Tensor) -> Tensor:
    """An output of the module, or a gradient of it, as (B, T, m): a bias of m numbers is added to each of T tokens."""
    kind = kind_of(module)
    if kind in CHANNELS_FIRST:
        return y.reshape(*y.shape[:2], -1).mT
    if kind in (NORM, BARE):
        return y.reshape(len(y), -1, (module.weight if kind is NORM else module.bias).numel())  # type: ignore[operator]
    return y.reshape(len(y), -1, y.shape[-1])


def shaped(module: nn.Module, y: Tensor, like: Tensor) -> Tensor:
    """The inverse of `tokens`."""
    return (y.mT if kind_of(module) in CHANNELS_FIRST else y).reshape(like.shape)


def few_tokens(module: nn.Module, grad: Tensor) -> bool:
    """Whether a weight's gradients are kept as outer products: all of matrices, and those of a convolution where they
    have fewer numbers than the gradient itself, T (m + n) and not m n. Others are formed (`own_gradients`)."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return kind_of(module) in (LINEAR, TURNED)
    m, n = module.weight.flatten(1).shape
    return module.groups == 1 and grad[0, 0].numel() * (m + n) < m * n


def inputs(module: nn.Module, x: Tensor) -> Tensor:
    """What a weight matrix multiplies, (B, ..., n): of a convolution the patches of x, else x itself."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return x
    x = padded(module, x)
    x = x[:, :, None] if isinstance(module, nn.Conv1d) else x
    size, dilation, stride = ((1, *both)[-2:] for both in (module.kernel_size, module.dilation, module.stride))
    return F.unfold(x, size, dilation, stride=stride).mT


def padded(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """x with the convolution's own padding, whatever its kind, so that what follows needs none."""
    around = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, around, mode=mode) if any(around) else x


def own_gradients(module: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """(B, numel): each example's gradient of the weight, of a scale or of a convolution."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return tokens(module, scaled(module, x)).mul_(tokens(module, grad)).sum(1)
    of = conv1d_weight if isinstance(module, nn.Conv1d) else conv2d_weight
    shape = (len(x) * len(module.weight), *module.weight.shape[1:])
    found = of(_side_by_side(padded(module, x)), shape, _side_by_side(grad), **_in_groups(module, len(x)))
    return found.reshape(len(x), -1)


def own_outputs(module: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    """What such a layer makes of x without a bias and with weights (B, 1, numel) for each example: (B, T, m)."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return tokens(module, scaled(module, x)) * weights
    of = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
    each = weights.reshape(-1, *module.weight.shape[1:]).to(x.dtype)
    out = of(_side_by_side(padded(module, x)), each, **_in_groups(module, len(x)))
    return tokens(module, out.reshape(len(x), -1, *out.shape[2:]))


def _side_by_side(x: Tensor) -> Tensor:
    """B examples of C channels as one of B · C: as many groups keep them apart."""
    return x.reshape(1, -1, *x.shape[2:])


def _in_groups(module: nn.Conv1d | nn.Conv2d, examples: int) -> dict[str, Any]:
    return dict(stride=module.stride, dilation=module.dilation, groups=examples * module.groups)


def scaled(module: nn.Module, x: Tensor) -> Tensor:
    """f(x) of a module of kind NORM, GROUP_NORM or SCALE: what its weight multiplies."""
    if isinstance(module, LINEAR | EMBEDDING):
        raise TypeError(f"{type(module).__name__} scales nothing")
    if isinstance(module, NORM):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, GROUP_NORM):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    one = torch.ones_like(module.weight, dtype=x.dtype)  # type: ignore[arg-type]
    return _with(module, one, x) - _with(module, torch.zeros_like(one), x)  # where the weight is 1 + w, too


def _with(module: nn.Module, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the module's forward makes of x with this weight and bias, none of its hooks called."""
    kept = dict(module._parameters)
    try:
        for name, p in kept.items():
            if p is not None:
                other = torch.zeros_like(weight) if bias is None else bias
                module._parameters[name] = weight if name == "weight" else other  # type: ignore[assignment]  # will do
        return module.forward(x)
    finally:
        module._parameters.update(kept)


def _tried(module: nn.Module, own: dict[str, nn.Parameter]) -> object:
    """Found out on a copy: a layer that sets itself up by the first batch that it sees (ActNorm) has not seen one."""
    try:
        copy = deepcopy(module)
    except Exception:  # whatever a layer holds that cannot be copied
        return None
    return TURNED if _is_turned(copy, own) else SCALE if _is_scale(copy, own) else None


@torch.no_grad()
def _is_turned(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    weight = own.get("weight")
    if type(module).__name__ != "Conv1D" or weight is None or weight.ndim != 2:
        return False
    given, bias = _drawn((2, 3, weight.shape[0]), weight), own.get("bias")
    expected = given @ weight if bias is None else given @ weight + bias
    return _gives(module, lambda: module.forward(given), expected)


@torch.no_grad()
def _is_scale(module: nn.Module, own: dict[str, nn.Parameter]) -> bool:
    weight = own.get("weight")
    if (
        weight is None
        or weight.ndim != 1
        or weight.numel() == 1  # one number for all elements, or for an axis of one: nothing tells
        or any(p.shape != weight.shape for p in own.values())
        or any(module.children())
    ):
        return False
    x, by, to = (_drawn(shape, weight) for shape in ((2, 3, len(weight)), weight.shape, weight.shape))
    try:
        expected = _with(module, torch.zeros_like(weight), x) + scaled(module, x) * by
    except Exception:  # whatever another kind of layer makes of three axes
        return False
    expected = expected + to if "bias" in own else expected
    whole = _gives(module, lambda: _with(module, by, x, to), expected)
    return whole and _gives(module, lambda: _with(module, by, x[:1], to), expected[:1])


def _drawn(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(like)


def _gives(module: nn.Module, run: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        found = run()
    except Exception:  # whatever another kind of layer makes of three axes
        return False
    limit = torch.finfo(expected.dtype).eps ** 0.5 if expected.dtype.itemsize < 8 else 1e-5  # some compute in float32
    return found.shape == expected.shape and torch.allclose(wide(found), wide(expected), rtol=limit, atol=limit)


See = Callable[[str, nn.Module, tuple, dict, Tensor], Tensor | None]
"""(name, module, args, kwargs, output) -> what to go on with in place of the output, None for itself."""


class Lookups(TorchFunctionMode):
    """Inside, `see` sees what modules of kind LOOKUP look up, one row of indices for each of `examples()`."""

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], see: See, examples: Callable[[], int | None]):
        super().__init__()
        self.tables = {id(module.weight): (name, module) for name, module in modules if kind_of(module) == LOOKUP}
        self.see, self.examples = see, examples

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.embedding or id(args[1]) not in self.tables:
            return func(*args, **kwargs)
        ids, size = args[0], self.examples()
        if size and ids.dim() and ids.shape[0] == 1:  # positions that all examples share
            ids = ids.expand(size, *ids.shape[1:])
        found = func(ids, *args[1:], **kwargs)
        seen = self.see(*self.tables[id(args[1])], (ids,), {}, found)
        return found if seen is None else seen


class Bare(nn.Module):
    """A bare parameter of leading dimension 1 (ViT's position embeddings), seen as a layer that is nothing but a bias.
    It puts out as many copies as there are examples, and its module meets them in the parameter's place."""

    def __init__(self, module: nn.Module, which: str):
        super().__init__()
        self.bias = module._parameters[which]
        self.place = module, which  # a tuple, lest it be a submodule

    @staticmethod
    def fits(module: nn.Module, which: str) -> bool:
        """Whether it may be one. What is called weight or bias belongs to a layer, and may be a matrix of one row."""
        p, runs = module._parameters[which], type(module).forward is not nn.Module.forward
        if isinstance(module, ParametrizationList):  # a matrix of one row, of which a weight is made
            return False
        return runs and p is not None and p.dim() > 1 and len(p) == 1 and which not in ("weight", "bias")

    @contextmanager
    def copied(self, name: str, see: See, examples: Callable[[], int | None]) -> Iterator[None]:
        """Inside, `see` sees, and may replace, the copies that the parameter's module meets when it runs."""
        module, which = self.place

        def copy(*_) -> None:
            found, size = module._parameters[which], examples()  # perhaps it has been replaced already
            assert found is not None
            if size and len(found) == 1:
                found = found.expand(size, *found.shape[1:])  # type: ignore[assignment]
            seen = see(name, self, (found,), {}, found)
            module._parameters[which] = found if seen is None else seen  # type: ignore[assignment]  # will do

        def restore(*_) -> None:
            module._parameters[which] = self.bias

        handles = [module.register_forward_pre_hook(copy), module.register_forward_hook(restore, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            restore()
