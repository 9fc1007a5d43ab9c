"""Per-example gradients of weight matrices in factored form, never multiplied out: what `per_example` computes with."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .gradients import wide

Layer = TypeVar("Layer")
GHOST_BLOCK = 64  # tokens in a block of a ghost norm
GRAM_BLOCK = 128  # tokens in a block of a Gram matrix by tokens
LAYERS = 2**26  # numbers of a tensor that several layers' are put together in: what is longer keeps a GPU busy alone
BLOCK = 2**22  # numbers held at a time where forming the gradient itself is cheaper than the ghost norm


class OuterProducts(NamedTuple):
    """Linear weights that share an input: g_i = Σ_t left_itᵀ right_it, for each left."""

    right: Tensor  # (B, T, n), the input
    lefts: dict[int, Tensor]  # parameter's position -> (B, T, m), the output gradient
    start: int = 0  # place of its first example, where the batch was recorded in pieces

    @property
    def examples(self) -> slice:
        return slice(self.start, self.start + len(self.right))

    def left(self, k: int) -> Tensor:
        return wide(self.lefts[k])

    def rows(self, k: int, size: int) -> Iterator[Tensor]:
        """The per-example gradients of weight k, `size` rows at a time: (B, rows · n)."""
        right = wide(self.right)
        for part in self.left(k).split(size, 2):
            yield torch.bmm(part.mT, right).flatten(1)

    def squared_norms(self) -> Tensor:
        _, tokens, n = self.right.shape
        m = sum(left.shape[2] for left in self.lefts.values())
        if tokens * (m + n) >= m * n:
            size = max(1, BLOCK // (len(self.right) * n))
            blocks = [block.square().sum(1) for k in self.lefts for block in self.rows(k, size)]
            return sum(blocks[1:], blocks[0])
        right, lefts = wide(self.right), [self.left(k) for k in self.lefts]
        parts: list[Tensor] = []
        for start in range(0, tokens, GHOST_BLOCK):  # symmetric: only blocks on and above the diagonal
            stop = start + GHOST_BLOCK
            of_lefts = torch.bmm(lefts[0][:, start:stop], lefts[0][:, start:].mT)
            for left in lefts[1:]:
                of_lefts.baddbmm_(left[:, start:stop], left[:, start:].mT)
            both = torch.bmm(right[:, start:stop], right[:, start:].mT).mul_(of_lefts)
            if stop - start >= tokens:  # one block is all: the same number, by fewer operators
                return both.sum((1, 2))
            parts.append(2 * both.sum((1, 2)) - both[:, :, :GHOST_BLOCK].sum((1, 2)))
        return sum(parts[1:], parts[0])

    @classmethod
    def layers_of(cls, products: Iterable["OuterProducts"]) -> "Iterator[OuterProducts]":
        """The same, those of equal shapes (a network's layers) as one of L · B examples, so that an operator serves
        them all: at least in float32, at most `LAYERS` numbers a tensor. Of all examples each, with the keys 0, 1, …"""
        for several in alike(products, lambda one: (one.right, *one.lefts.values())):
            rights, *lefts = zip(*((one.right, *one.lefts.values()) for one in several), strict=True)
            yield cls(stacked(rights), dict(enumerate(map(stacked, lefts))))

    def dots(self, directions: dict[int, Tensor]) -> Tensor:
        """g_i · d summed over the weights k of `directions`, k -> d (m, n): (B,)."""
        right = wide(self.right)
        lefts = {k: self.left(k).flatten(0, 1) for k in directions}
        directions = {k: d.to(right.dtype) for k, d in directions.items()}
        # Multiplied out on the smaller side: a product of its size is left to sum.
        if sum(left.shape[1] for left in lefts.values()) < right.shape[2]:
            pairs = [(right.flatten(0, 1) @ directions[k].mT, left) for k, left in lefts.items()]
        else:
            (first, left), *others = lefts.items()
            back = left @ directions[first]
            for k, left in others:
                back.addmm_(left, directions[k])
            pairs = [(back, right.flatten(0, 1))]
        parts = [x.mul_(y).view(len(right), -1).sum(1) for x, y in pairs]
        return sum(parts[1:], parts[0])

    def outputs(self, k: int, x: Tensor, scales: Tensor) -> Tensor:
        """scales_i g_i x_it for weight k: what a Linear's outputs gain when example i's weight moves by scales_i g_i.

        x (B, S, n), scales (B, 1, 1) -> (B, S, m). Costs S·T·(m + n) an example where the layer costs S·m·n.
        """
        inner = torch.bmm(x, self.right.mT.to(x.dtype)) * scales.to(x.dtype)
        return torch.bmm(inner, self.lefts[k].to(inner.dtype))

    def moved(self, k: int, x: Tensor, scaled: Tensor, scales: Tensor | None, output: Tensor) -> Tensor:
        """`output` and what `outputs` gives, in two products and nothing else; with `scales` (B, 1, 1) also what a
        bias gives that is added wherever weight k is used: its gradient is Σ_t left_it, as if each input had one more
        element, a 1. `scaled`: scales_i right_it, which weights that share an input share too. Both in k's type.
        """
        left = self.lefts[k]
        if scales is None:
            inner = torch.bmm(x.to(left.dtype), scaled.mT)
        else:
            inner = torch.baddbmm(scales, x.to(left.dtype), scaled.mT)
        return torch.baddbmm(output, inner.to(output.dtype), left.to(output.dtype))

    def turned_outputs(self, k: int, x: Tensor, scales: Tensor) -> Tensor:
        """The same of a layer that multiplies by weight k itself: scales_i x_it g_i, x (B, S, m) -> (B, S, n)."""
        inner = torch.bmm(x, self.lefts[k].mT.to(x.dtype)) * scales.to(x.dtype)
        return torch.bmm(inner, self.right.to(inner.dtype))

    def lookups(self, k: int, ids: Tensor, scales: Tensor) -> Tensor:
        """Rows `ids` (B, S) of scales_i g_i for weight k, tied to an embedding: (B, S, n)."""
        left = self.lefts[k]
        columns = left.gather(2, ids[:, None].expand(-1, left.shape[1], -1))
        return torch.bmm(columns.mT, self.right.to(left.dtype)) * scales.to(left.dtype)

    def minus(self, other: "OuterProducts") -> "OuterProducts":
        lefts = {k: torch.cat([left, -other.lefts[k]], 1) for k, left in self.lefts.items()}
        return OuterProducts(torch.cat([self.right, other.right], 1), lefts, self.start)

    def add_to(self, sums: list[Tensor | None], weights: Tensor | float) -> None:
        """Adds Σ_i weights[i] g_i of each weight k to sums[k]; weights (B,), or one number for all."""
        dtype = next(iter(self.lefts.values())).dtype
        # Scale whichever side is the smaller to copy; one number, neither.
        scale_right = sum(left.shape[2] for left in self.lefts.values()) >= self.right.shape[2]
        common = 1.0 if isinstance(weights, Tensor) else weights

        def scaled(x: Tensor, this: bool) -> Tensor:
            return (x * weights.view(-1, 1, 1) if this and isinstance(weights, Tensor) else x).flatten(0, 1).to(dtype)

        right = scaled(self.right, scale_right)
        for k, left in self.lefts.items():
            left = scaled(left, not scale_right).mT
            total = sums[k]
            if total is not None and dtype == total.dtype == wide(total).dtype:
                total.addmm_(left, right, alpha=common)
                continue
            product = torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=common)
            # Half precision rounds each product, as autograd does, but not their sum.
            sums[k] = product if total is None else wide(total) + product


def alike(layers: Iterable[Layer], tensors: Callable[[Layer], Sequence[Tensor]]) -> Iterator[list[Layer]]:
    """The layers in groups whose `tensors` have the same shapes and types, of at most `LAYERS` numbers stacked."""
    found: dict[tuple, list[Layer]] = defaultdict(list)
    for layer in layers:
        found[tuple((x.shape, x.dtype) for x in tensors(layer))].append(layer)
    for several in found.values():
        size = max(1, LAYERS // max(x.numel() for x in tensors(several[0])))
        yield from (several[k : k + size] for k in range(0, len(several), size))


def stacked(layers: Sequence[Tensor]) -> Tensor:
    """L tensors (B, …) as one (L · B, …) in at least float32, by one operator."""
    first = layers[0]
    if len(layers) == 1:
        return wide(first)
    found = first.new_empty(len(layers), *first.shape, dtype=torch.promote_types(first.dtype, torch.float32))
    torch._foreach_copy_(list(found.unbind()), list(layers))
    return found.flatten(0, 1)


class WeightGroup(NamedTuple):
    """Weights that share their inputs, over all pieces of a batch."""

    keys: tuple[int, ...]
    parts: list[OuterProducts]

    @classmethod
    def of(cls, products: Sequence[OuterProducts]) -> "list[WeightGroup]":
        def grouped(keys_of) -> "list[WeightGroup]":
            found: dict[tuple[int, ...], list[OuterProducts]] = {}
            for part in products:
                for keys in keys_of(part):
                    found.setdefault(keys, []).append(part)
            return [cls(keys, parts) for keys, parts in found.items()]

        groups = grouped(lambda part: [tuple(part.lefts)])
        keys = [k for group in groups for k in group.keys]
        # Where a piece groups them in another way than the next: weight by weight.
        return groups if len(keys) == len(set(keys)) else grouped(lambda part: [(k,) for k in part.lefts])

    @property
    def size(self) -> tuple[int, int, int]:
        """(tokens, m, n) over all parts and keys."""
        tokens = sum(part.right.shape[0] * part.right.shape[1] for part in self.parts)
        return tokens, sum(self.parts[0].lefts[k].shape[2] for k in self.keys), self.parts[0].right.shape[2]

    @property
    def few_tokens(self) -> bool:
        """Whether the products of all tokens, about N²(m + n)/2 of them, cost less than what the mean gradient and
        its product with each example's do, 2 N m n."""
        tokens, m, n = self.size
        return tokens * (m + n) < 4 * m * n

    def gram(self, batch_size: int) -> Tensor:
        """g_i · g_j: (B, B)."""
        tokens, m, n = self.size
        if tokens**2 * (m + n) < 2 * (tokens + batch_size**2) * m * n:
            return self.gram_by_tokens(batch_size)
        total = self.parts[0].right.new_zeros(batch_size, batch_size, dtype=wide(self.parts[0].right).dtype)
        everyone = torch.arange(batch_size, device=total.device)
        there = torch.cat([everyone[part.examples] for part in self.parts])
        for k in self.keys:
            for rows in zip(*(part.rows(k, max(1, BLOCK // (len(there) * n))) for part in self.parts), strict=True):
                gradients = torch.cat(rows)
                total[there[:, None], there] += gradients @ gradients.mT
        return total

    def gram_by_tokens(self, batch_size: int) -> Tensor:
        """The same from the products of all pairs of tokens, which never forms a gradient."""
        right = wide(torch.cat([part.right.flatten(0, 1) for part in self.parts]))
        lefts = [wide(torch.cat([part.lefts[k].flatten(0, 1) for part in self.parts])) for k in self.keys]
        everyone = torch.arange(batch_size, device=right.device)
        owner = torch.cat([everyone[part.examples].repeat_interleave(part.right.shape[1]) for part in self.parts])
        member = torch.nn.functional.one_hot(owner, batch_size).to(right.dtype)  # (N, B)
        upper, diagonal = right.new_zeros(2, batch_size, batch_size)
        for start in range(0, len(right), GRAM_BLOCK):  # symmetric: only blocks on and above the diagonal
            block = slice(start, start + GRAM_BLOCK)
            both = lefts[0][block] @ lefts[0][start:].mT
            for left in lefts[1:]:
                both.addmm_(left[block], left[start:].mT)
            both.mul_(right[block] @ right[start:].mT)
            upper += member[block].mT @ (both @ member[start:])
            diagonal += member[block].mT @ (both[:, :GRAM_BLOCK] @ member[block])
        return upper + upper.mT - diagonal


KEYS = 2**32  # above any index of an embedding: example · KEYS + index is a pair's key


class Rows(NamedTuple):
    """An embedding's per-example gradients by their non-zero rows, R of them, sorted by example and index."""

    examples: Tensor  # (R,)
    ids: Tensor  # (R,)
    values: Tensor  # (R, n)
    batch_size: int
    sizes: list[int] | None = None  # rows of each example, where they are known without a look at `examples`

    @classmethod
    def of(cls, uses: list[tuple[Tensor, Tensor, int | None]], batch_size: int) -> "Rows":
        ids = torch.cat([ids.reshape(batch_size, -1) for ids, _, _ in uses], 1)
        several = len({padding for _, _, padding in uses}) > 1  # tables that share a weight, and not its padding
        parts = [
            (grad.masked_fill((ids == padding)[..., None], 0) if several and padding is not None else grad).reshape(
                batch_size, -1, grad.shape[-1]
            )
            for ids, grad, padding in uses
        ]
        grads = wide(parts[0] if len(parts) == 1 else torch.cat(parts, 1)).flatten(0, 1)
        examples = torch.arange(batch_size, device=ids.device)[:, None].expand_as(ids)
        rows = cls.summed(examples.flatten(), ids.flatten(), grads, batch_size, [ids.shape[1]] * batch_size)
        for index in {padding for _, _, padding in uses if padding is not None and not several}:  # they get nothing
            rows.values.masked_fill_((rows.ids == index)[:, None], 0)
        return rows

    @classmethod
    def summed(cls, examples: Tensor, ids: Tensor, values: Tensor, batch_size: int, sizes: list[int] | None) -> "Rows":
        """One row for each pair of example and index: the sum of the pair's values."""
        if ids.device.type != "cpu":
            return cls._summed_in_place(examples, ids, values, batch_size, sizes)
        size = int(ids.max()) + 1
        keys, inverse = (ids + size * examples).unique(return_inverse=True)
        values = torch.ops.aten.embedding_dense_backward(values, inverse, len(keys), -1, False)
        return cls(keys // size, keys % size, values, batch_size)

    @classmethod
    def _summed_in_place(
        cls, examples: Tensor, ids: Tensor, values: Tensor, batch_size: int, sizes: list[int] | None
    ) -> "Rows":
        """The same with as many rows as were given, so that nobody waits for their number: a pair's sum stands at its
        first row, and zeros at its others."""
        keys, order = (ids + KEYS * examples).sort(stable=True)
        place = torch.arange(len(keys), device=keys.device)
        begins = torch.cat([keys.new_ones(1, dtype=torch.bool), keys[1:] != keys[:-1]])
        first = torch.where(begins, place, 0).cummax(0).values
        summed = torch.zeros_like(values).index_add_(0, first, values[order])
        return cls(keys // KEYS, keys % KEYS, summed, batch_size, sizes)

    def counts(self) -> list[int]:
        """Rows of each example."""
        return self.sizes or self.examples.bincount(minlength=self.batch_size).tolist()

    def minus(self, other: "Rows") -> "Rows":
        examples, ids = torch.cat([self.examples, other.examples]), torch.cat([self.ids, other.ids])
        sizes = None
        if self.sizes and other.sizes:
            sizes = [ours + theirs for ours, theirs in zip(self.sizes, other.sizes, strict=True)]
        return Rows.summed(examples, ids, torch.cat([self.values, -other.values]), self.batch_size, sizes)

    def lookups(self, ids: Tensor, scales: Tensor) -> Tensor:
        """Rows `ids` (B, S) of scales_i g_i: (B, S, n), zeros where the example never looked that row up."""
        keys = self.ids + KEYS * self.examples
        wanted = ids + KEYS * torch.arange(self.batch_size, device=ids.device)[:, None]
        places = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        return self.values[places] * (keys[places] == wanted)[..., None] * scales

    def outputs(self, x: Tensor, size: int, scales: Tensor) -> Tensor:
        """scales_i g_i x_it of a Linear with `size` outputs tied to the embedding: (B, S, n) -> (B, S, size)."""
        counts = self.counts()
        parts = zip(x, self.ids.split(counts), self.values.split(counts), scales.flatten(), strict=True)
        empty = x.new_zeros(x.shape[1], size)
        return torch.stack([empty.index_add(1, ids, (c * a @ v.mT.to(a.dtype))) for a, ids, v, c in parts])

    def per_example(self, of_rows: Tensor) -> Tensor:
        """Sum over each example's rows: (R,) -> (B,)."""
        return of_rows.new_zeros(self.batch_size).index_add_(0, self.examples, of_rows)

    def squared_norms(self) -> Tensor:
        return self.per_example(self.values.square().sum(1))

    def gram(self) -> Tensor:
        sizes = self.counts()
        parts = zip(self.ids.split(sizes), self.values.split(sizes), strict=True)
        products = (((values @ self.values.mT) * (ids[:, None] == self.ids)).sum(0) for ids, values in parts)
        return torch.stack([self.per_example(product) for product in products])

    def gram_with(self, left: Tensor, right: Tensor) -> Tensor:
        """Products with a Linear's g_i of the same weight: left (B, T, V), right (B, T, n) -> (B, B)."""
        pairs = zip(left, wide(right), strict=True)
        products = ((a @ self.values.mT).mul_(d[:, self.ids]).sum(0) for d, a in pairs)
        return torch.stack([self.per_example(product) for product in products])

    def weighted_sum(self, weights: Tensor | float, size: int) -> Tensor:
        """Σ_i weights[i] g_i: (size, n), on a CPU sparse; one number counts for all examples."""
        if isinstance(weights, Tensor):
            weights = weights.to(self.values.dtype)[self.examples, None]
        values = self.values * weights
        if values.device.type != "cpu":
            return values.new_zeros(size, values.shape[1]).index_add_(0, self.ids, values)
        return torch.sparse_coo_tensor(self.ids[None], values, (size, values.shape[1]), check_invariants=False)
