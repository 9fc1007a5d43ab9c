"""Padding-free passes: a batch's tokens as one row through an encoder's layers, attention within each example."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..glue import Tokenised
from ..methods import Method
from ..methods.layers import DoesNotFit, hidden_of, stacks_of, with_hidden
from ..text import first_line
from . import dropout as padded
from .dropout import BEYOND, dropout


class Layout:
    """Where the N tokens of a batch (B, T), padded on the right, lie in one row of them, the shortest example first.

    `index` (N,): their places in (B · T). `groups`: (its examples (n,), their length) of each length that there is.
    """

    def __init__(self, mask: Tensor):
        self.shape = mask.shape
        lengths = mask.sum(1)
        order = torch.argsort(lengths, stable=True)
        places = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
        self.index = places[order][mask[order].bool()]
        found, counts = torch.unique_consecutive(lengths[order], return_counts=True)
        self.groups = list(zip(order.split(counts.tolist()), found.tolist(), strict=True))
        self.sizes = [len(rows) * length for rows, length in self.groups]
        self._hidden: dict[int, tuple[Tensor, list[Tensor | None]]] = {}

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, …), or (1, T, …) for what is the same in all examples, to (1, N, …)."""
        whole = x.expand(self.shape[0], *x.shape[1:]) if x.shape[0] == 1 else x
        return whole.reshape(-1, *x.shape[2:]).index_select(0, self.index)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, N, …) to (B, T, …), zero at padding."""
        whole = x.new_zeros(self.shape.numel(), *x.shape[2:]).index_copy(0, self.index, x[0])
        return whole.view(*self.shape, *x.shape[2:])

    def hidden(self, mask: Tensor | None) -> list[Tensor | None]:
        """What an additive mask (B or 1, H or 1, T, T) adds to the scores of each group's tokens, (n or 1, H or 1,
        length, length); None where that is nothing, as of a mask that hides padding alone."""
        if mask is None:
            return [None] * len(self.groups)
        if id(mask) not in self._hidden:  # the same for all layers; kept, so that no other takes its place
            parts = [
                (mask if mask.shape[0] == 1 else mask[rows])[:, :, :length, :length] for rows, length in self.groups
            ]
            self._hidden[id(mask)] = mask, [part if part.requires_grad or part.any() else None for part in parts]
        return self._hidden[id(mask)][1]


_layout: Layout | None = None
"""Of the pass that is between a packed encoder's first layer and its last."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """`dropout.attention` between packed layers within each example, all of one length at once; and itself elsewhere.

    Of shape (1, H, N, d) there; mask and bias as the padded batch has them.
    """
    if _layout is None:
        given: dict[str, Any] = options | {"position_bias": position_bias}
        return padded.attention(module, query, key, value, attention_mask, scaling, dropout, **given)
    if key.shape[1] != query.shape[1] or any(options.get(name) is not None for name in BEYOND):
        raise DoesNotFit("attention that is not BERT's")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads, size = query.shape[1], query.shape[-1]
    by_group = [x[0].transpose(0, 1).split(_layout.sizes) for x in (query * scaling, key, value)]
    added = [_layout.hidden(x) for x in (attention_mask, position_bias)]
    found = []
    for q, k, v, (rows, length), *more in zip(*by_group, _layout.groups, *added, strict=True):
        q, k, v = (x.reshape(len(rows), length, heads, size).transpose(1, 2) for x in (q, k, v))
        scores = torch.matmul(q, k.transpose(2, 3))
        for x in more:
            scores = scores if x is None else scores + x
        shares = nn.functional.softmax(scores, dim=-1)
        if module.training:
            shares = _dropout(shares, dropout)
        found.append(torch.matmul(shares, v).transpose(1, 2).reshape(-1, heads, size))
    return torch.cat(found)[None], None


_dropout = dropout  # `attention` has an argument of that name
NAME = "dsam_padding_free"
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)


def _mpnet(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **options,
) -> tuple:
    """MPNet's attention, which transformers does not call by its interface, through `attention`."""
    if _layout is None:
        return type(module).forward(module, hidden_states, attention_mask, position_bias, output_attentions, **options)
    shape = (*hidden_states.shape[:-1], module.num_attention_heads, module.attention_head_size)
    q, k, v = (layer(hidden_states).view(shape).transpose(1, 2) for layer in (module.q, module.k, module.v))
    found, _ = attention(module, q, k, v, attention_mask, dropout=module.dropout.p, position_bias=position_bias)
    return (module.o(found.flatten(2)),)


class PaddingFree:
    """Inside `with`, the network's layers see a batch's tokens and none of its padding, by hooks: linear layers,
    normalisation, activations and dropout on (1, N, D). Embeddings, pooler and head see (B, T), as ever.

    Raises DoesNotFit for a network with a decoder or whose attention is code of its own; MPNet's is known.
    """

    def __init__(self, network: PreTrainedModel):
        self.network, self.stack = network, stacks_of(network)[0]
        self._own = [module for module in network.modules() if type(module).__name__ == "MPNetSelfAttention"]
        if network.config.is_encoder_decoder:
            raise DoesNotFit(f"{type(network).__name__} has a decoder as well")
        if not self._own and network.config._attn_implementation not in (padded.NAME, NAME):
            raise DoesNotFit(f"{type(network).__name__}'s attention is code of its own")
        if not self._own:
            network.set_attn_implementation(NAME)
        self._hooks = ExitStack()
        self._of_pass: Layout | None = None

    def __enter__(self) -> "PaddingFree":
        enter = self._hooks.enter_context
        enter(self.network.register_forward_pre_hook(self._begin, with_kwargs=True))
        enter(self.network.register_forward_hook(self._end, always_call=True))
        enter(self.stack[0].register_forward_pre_hook(self._pack, with_kwargs=True))
        for layer in self.stack:
            enter(layer.register_forward_pre_hook(self._pack_places, with_kwargs=True))
        enter(self.stack[-1].register_forward_hook(self._unpack))
        for module in self._own:
            module.forward = partial(_mpnet, module)
        return self

    def __exit__(self, *_) -> None:
        self._hooks.close()
        for module in self._own:
            vars(module).pop("forward", None)
        self._end()

    def _begin(self, _, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        self._of_pass = None if mask is None else Layout(mask)

    def _end(self, *_) -> None:
        global _layout
        _layout = self._of_pass = None

    def _pack(self, _, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        global _layout
        _layout = self._of_pass
        if _layout is None:
            return None
        return with_hidden(args, kwargs, _layout.pack(hidden_of(args, kwargs)))

    def _pack_places(self, _, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """What a layer is told of each place (rotary positions) goes the tokens' way."""
        layout = _layout
        if layout is None:
            return None
        hidden, (examples, width) = hidden_of(args, kwargs), layout.shape

        def packed(x: Any) -> Any:
            of_places = isinstance(x, Tensor) and 1 < x.ndim < 4 and x.shape[0] in (1, examples) and x.shape[1] == width
            return layout.pack(x) if of_places and x is not hidden else x

        return tree_map(packed, (args, kwargs))

    def _unpack(self, _, args: tuple, output: Any) -> Any:
        global _layout
        layout, _layout = _layout, None
        if layout is None:
            return None
        return layout.unpack(output) if isinstance(output, Tensor) else (layout.unpack(output[0]), *output[1:])


def padding_free(
    network: PreTrainedModel, examples: Tokenised, method: Method, whole: bool = False
) -> tuple[PaddingFree | None, list[str]]:
    """(what runs this method's passes over these examples without padding, notes); None where it is not shown to give
    what padded passes give, and the note says why.

    Args:
        whole: the network's outputs depend on padding.
    """
    try:
        return _fitting(network, examples, method, whole), []
    except DoesNotFit as why:
        return None, [f"train.padding=free: {why}: batches are padded"]


def _fitting(network: PreTrainedModel, examples: Tokenised, method: Method, whole: bool) -> PaddingFree:
    name = type(network).__name__
    if network.device.type != "cpu":
        raise DoesNotFit("it is not made for a GPU")  # which many small attentions, each a launch, would not suit
    if whole:
        raise DoesNotFit(f"{name}'s outputs depend on padding")
    if method.by_example:
        raise DoesNotFit(f"{type(method).__name__} takes single examples' gradients inside the layers")
    if examples.pad_left:
        raise DoesNotFit(f"{name} is padded on the left")
    usual = network.config._attn_implementation
    found = PaddingFree(network)
    try:
        if _same(found, examples):
            return found
        why = f"{name} gives other outputs without"
    except Exception as error:  # whatever a layer that takes no packed row raises inside torch
        why = f"{name} cannot do without ({first_line(error)})"
    if network.config._attn_implementation != usual:
        network.set_attn_implementation(usual)
    raise DoesNotFit(why)


@torch.no_grad()
def _same(packed: PaddingFree, examples: Tokenised) -> bool:
    """Whether logits and last hidden states of three examples are the same packed and padded, without dropout: the
    longest, in which a window of attention would show, the shortest and one between."""
    network, was_training = packed.network, packed.network.training
    order = examples.lengths.argsort(kind="stable")
    inputs = examples.batch(order[[0, len(order) // 2, -1]])
    inputs.pop("labels", None)
    mask, hidden = inputs["attention_mask"].bool(), []
    network.eval()
    try:
        with network.base_model.register_forward_hook(lambda _, __, output: hidden.append(output[0])):
            logits = [network(**inputs).logits]
            with packed:
                logits.append(network(**inputs).logits)
    finally:
        network.train(was_training)
    pairs = [logits, [x[mask] for x in hidden if x.shape[:2] == mask.shape]]
    return all(bool((one - other).abs().max() <= 1e-4 * one.abs().max()) for one, other in pairs)
