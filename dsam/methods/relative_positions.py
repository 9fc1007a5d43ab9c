"""Tables of relative positions, which a model looks up once for all examples, given to each example apart.

Inside `positions_apart` the model's outputs are the same, and what belongs to a table has one row for each example, as
per-example gradients need it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

Examples = Callable[[], int | None]
"""How many examples a pass has, None where that is not known."""

TABLES = ("compute_position_bias", "compute_bias")
"""Methods that look `relative_attention_bias` up: MPNet's and T5's."""


@contextmanager
def positions_apart(model: nn.Module, examples: Examples) -> Iterator[None]:
    """Inside, the tables of MPNet, T5 and DeBERTa v2/v3 (He et al. 2021, arXiv 2006.03654, §3.1) are met by each of
    `examples()` apart."""
    patched: list[tuple[nn.Module, str]] = []

    def replace(module: nn.Module, name: str, by: Callable) -> None:
        if name not in vars(module):
            setattr(module, name, partial(by, module, getattr(module, name)))
            patched.append((module, name))

    try:
        for module in model.modules():
            for name in TABLES:
                if hasattr(type(module), name) and isinstance(
                    module._modules.get("relative_attention_bias"), nn.Embedding
                ):
                    replace(module, name, partial(_bias, examples))
            if _is_disentangled(module):
                shown = _Shown(examples)
                replace(module, "get_rel_pos", shown.positions)
                replace(module, "get_rel_embedding", shown.embeddings)
                for layer in module.modules():
                    if hasattr(layer, "disentangled_attention_bias"):
                        replace(layer, "forward", _attention)
                        replace(layer, "disentangled_attention_bias", _disentangled)
        yield
    finally:
        for module, name in patched:
            delattr(module, name)


def _bias(examples: Examples, module: nn.Module, look_up: Callable[..., Tensor], *args, **kwargs) -> Tensor:
    """(B, heads, T, S) of what `look_up` gives for one or all."""
    table, size = module._modules["relative_attention_bias"], examples()
    assert isinstance(table, nn.Embedding)
    if size is None:
        return look_up(*args, **kwargs)
    asked = _Asked(table)
    with _in_place_of(module, {"relative_attention_bias": asked}):
        look_up(*args, **kwargs)
    return table(asked.ids.expand(size, *asked.ids.shape)).permute(0, 3, 1, 2)


@contextmanager
def _in_place_of(module: nn.Module, children: dict[str, nn.Module]) -> Iterator[None]:
    kept = dict(module._modules)
    module._modules.update(children)
    try:
        yield
    finally:
        module._modules.update(kept)


class _Asked(nn.Module):
    """Stands in for a table to learn what is looked up in it."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.weight = table.weight

    def forward(self, ids: Tensor) -> Tensor:
        self.ids = ids
        return self.weight.new_zeros(()).expand(*ids.shape, self.weight.shape[1])


def _is_disentangled(module: nn.Module) -> bool:
    """Whether it is DeBERTa v2's encoder. (v1's attention has bare parameters besides.)"""
    return (
        isinstance(module._modules.get("rel_embeddings"), nn.Embedding)
        and hasattr(module, "get_rel_pos")
        and hasattr(module, "get_rel_embedding")
        and any(hasattr(layer, "disentangled_attention_bias") for layer in module.modules())
    )


class _Shown:
    """What one DeBERTa v2 encoder shows its layers of its table: each example its own copy (B, S, D) of the S rows that
    T tokens can ask for, the middle 2 T. The layers' own code computes with them. It takes (S, D) and repeats the keys
    and queries that it makes of them; in `_disentangled` it is given one example of B times as many heads.
    """

    def __init__(self, examples: Examples):
        self.examples, self.tokens = examples, 0

    def positions(self, encoder: nn.Module, of: Callable, hidden_states: Tensor, *args, **kwargs):
        self.tokens = hidden_states.shape[-2]  # no two are further apart, in whatever buckets
        return of(hidden_states, *args, **kwargs)

    def embeddings(self, encoder: nn.Module, of: Callable[[], Tensor]) -> Tensor:
        """(B, S, D)."""
        table, size = encoder._modules["rel_embeddings"], self.examples()
        assert isinstance(table, nn.Embedding)
        if size is None:
            return of()
        middle = len(table.weight) // 2
        half = min(self.tokens, middle)
        ids = torch.arange(middle - half, middle + half, device=table.weight.device)
        with _in_place_of(encoder, {"rel_embeddings": _Table(table(ids.expand(size, -1)))}):
            return of()


def _attention(layer, forward: Callable, *args, **kwargs):
    same = _SameMask(layer.pos_dropout, 2 * layer.pos_ebd_size)
    with _in_place_of(layer, {"pos_dropout": same}):
        return forward(*args, **kwargs)


def _disentangled(
    layer,
    of: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    embeddings: Tensor,
    scale_factor: int,
) -> Tensor:
    """(B · heads, T, T) with the table's rows for each example, (B, S, D), or for all, (S, D)."""
    if embeddings.dim() == 2:
        return of(query, key, positions, embeddings, scale_factor)
    names = ("query_proj", "key_proj") if layer.share_att_key else ("pos_query_proj", "pos_key_proj")
    projections = {name: _SideBySide(layer._modules[name], embeddings) for name in names if name in layer._modules}
    heads, span = layer.num_attention_heads, layer.pos_ebd_size
    layer.num_attention_heads, layer.pos_ebd_size = heads * len(embeddings), embeddings.shape[1] // 2
    try:
        with _in_place_of(layer, projections):  # type: ignore[arg-type]
            return of(query, key, positions, embeddings[0], scale_factor)
    finally:
        layer.num_attention_heads, layer.pos_ebd_size = heads, span


class _Table(nn.Module):
    """Stands in for an embedding whose weight is read."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight


class _SameMask(nn.Module):
    """Drops of every example's rows, the middle of the table's `rows`, what the dropout drops of the one table."""

    def __init__(self, drop: nn.Module, rows: int):
        super().__init__()
        self.drop, self.rows = (drop,), rows  # a tuple, lest it be a submodule

    def forward(self, x: Tensor) -> Tensor:
        (drop,) = self.drop
        if x.dim() == 2:
            return drop(x)
        start = (self.rows - x.shape[1]) // 2
        return x * drop(x.new_ones(self.rows, x.shape[-1]))[start : start + x.shape[1]]


class _SideBySide(nn.Module):
    """Gives, whatever it is asked, the projections (B, S, m) of each example's rows as those (1, S, B · m) of one."""

    def __init__(self, projection: nn.Module, rows: Tensor):
        super().__init__()
        self.projection, self.rows = (projection,), rows

    def forward(self, _: Tensor) -> Tensor:
        (projection,) = self.projection
        each = projection(self.rows)
        return each.transpose(0, 1).reshape(1, each.shape[1], -1)
