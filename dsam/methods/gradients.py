"""Arithmetic on gradients (lists with one tensor per parameter, None where none came); passes without a trace."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .perturbation import Gradients, of_all_shards


def inner_product(a: Gradients, b: Gradients) -> Tensor:
    """Σ a·b over all parameters, in float32 or wider; None counts as zero."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        return torch.zeros(())
    return of_all_shards(torch.stack([_dot(wide(x), wide(y)) for x, y in pairs]).sum())


def _dot(x: Tensor, y: Tensor) -> Tensor:
    if x.is_complex():
        return torch.vdot(x.flatten(), y.flatten()).real
    return (x * y).sum() if hasattr(x, "full_tensor") else x.flatten().dot(y.flatten())  # shards may be uneven


def combine(a: Gradients, b: Gradients, scale: Tensor | float, times: Tensor | float = 1.0) -> list[Tensor | None]:
    """times · a + scale · b, as new tensors."""

    def one(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        if x is None:
            return None if y is None else y * scale
        return x * times if y is None else (x * times).add_(y * scale)

    return [one(x, y) for x, y in zip(a, b, strict=True)]


def without_component(a: Gradients, along: Gradients) -> list[Tensor | None]:
    """a − (a·u) u with u the unit vector of `along`; a itself where `along` is zero."""
    square = inner_product(along, along)
    share = torch.where(square > 0, inner_product(a, along) / square, 0)
    return combine(a, along, -share)


def add(total: list[Tensor | None] | None, gradient: Gradients) -> list[Tensor | None]:
    """`total`, written in place, plus `gradient`; None marks parameters that nothing has reached."""
    if total is None:
        return list(gradient)
    both = [(t, g) for t, g in zip(total, gradient, strict=True) if t is not None and g is not None]
    if both:
        torch._foreach_add_([t for t, _ in both], [g for _, g in both])
    return [g if t is None else t for t, g in zip(total, gradient, strict=True)]


def owned(gradients: Gradients) -> list[Tensor | None]:
    """Gradients of `torch.autograd.grad` that can be written: none expanded, no two in the same memory."""
    seen: set[int] = set()
    found: list[Tensor | None] = []
    for g in gradients:
        if g is not None:
            shared = _memory(g) in seen
            if g.is_sparse and shared:  # of two tables that are added, both have the same values
                values = g._values().clone()
                g = torch.sparse_coo_tensor(
                    g._indices(), values, g.shape, is_coalesced=g.is_coalesced(), check_invariants=False
                )
            elif not g.is_sparse and (shared or not (g.is_contiguous() or _is_dense(g))):
                g = g.clone(memory_format=torch.contiguous_format)
            seen.add(_memory(g))
        found.append(g)
    return found


def _memory(x: Tensor) -> int:
    return (x._values() if x.is_sparse else x).data_ptr()


def _is_dense(x: Tensor) -> bool:
    """Whether its numbers lie side by side in memory, in whatever order of the dimensions."""
    return torch.ops.aten.is_non_overlapping_and_dense(x)


@contextmanager
def sparse_gradient(table: nn.Embedding | None) -> Iterator[None]:
    """Inside, the table's gradients are sparse, so that the pieces of a batch are summed by the rows they use.

    A dense one is cleared and added once per piece: 47 MB for BERT's vocabulary at width 384.
    """
    if table is None:
        yield
        return
    before = table.sparse
    try:
        table.sparse = True
        yield
    finally:
        table.sparse = before


def dense(gradient: Tensor | None) -> Tensor | None:
    """A sparse gradient with all rows of its table, those that several pieces used summed; others as they are."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def whole(gradients: Gradients, by_rows: bool = False) -> list[Tensor | None]:
    """Each of the gradients dense; or, `by_rows`, sparse ones coalesced instead: every row that is used once."""
    return [g.coalesce() if by_rows and g is not None and g.is_sparse else dense(g) for g in gradients]


def outside_autocast(device: torch.device) -> AbstractContextManager:
    """Around backward passes and products, should the caller be inside autocast: PyTorch would apply it to them too."""
    kind = device.type
    within = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if within else nullcontext()


def wide(x: Tensor) -> Tensor:
    """In at least float32, in which inner products are accumulated."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def widest(x: Tensor) -> Tensor:
    """In float64 where the device has it: Apple's has float32 at most."""
    return x.float() if x.device.type == "mps" else x.double()


@contextmanager
def tf32_products(enough: bool = True) -> Iterator[None]:
    """Inside, an NVIDIA GPU rounds what enters its float32 matrix products to TensorFloat-32 where that is `enough`:
    10 bits of mantissa, which hold bfloat16's 7 exactly, at several times the speed. Elsewhere nothing changes."""
    products = torch.backends.cuda.matmul
    before = getattr(products, "fp32_precision", None)  # which PyTorch has since 2.9, and no other can always be read
    if not enough or (products.allow_tf32 if before is None else before == "tf32"):
        yield
        return
    products.allow_tf32 = True  # sets both, and PyTorch's own readers raise where the two differ
    try:
        yield
    finally:
        products.allow_tf32 = False
        if before is not None:
            products.fp32_precision = before
