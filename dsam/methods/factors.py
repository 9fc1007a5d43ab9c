"""The algebra of per-example gradients that are kept as factors: norms, products, weighted sums, differences.

A linear layer's gradient of example i is a sum of outer products over the tokens t, g_i = Σ_t δ_it a_itᵀ, of its
input a (B, T, n) and its output gradient δ (B, T, m). So ‖g_i‖² = Σ_ts (a_it·a_is)(δ_it·δ_is) needs only two T × T
products (Goodfellow 2015, arXiv 1510.01799, for T = 1; Li et al. 2021, arXiv 2110.05679, "ghost clipping"), and
Σ_i p_i g_i, with weights p chosen once the norms are known, is one product of stored tensors (Bu et al. 2022, arXiv
2210.00038, "book-keeping"). `outer_products` has the formulas of one layer.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .gradients import dense, tf32_products, whole
from .outer_products import OuterProducts, Rows, WeightGroup


def launches_cost(device: torch.device) -> bool:
    """Whether a small operator takes the time of its launch there, and few are better than little arithmetic."""
    return device.type != "cpu"


class GradientFactors:
    """The per-example gradients g_i of a batch in some parameters, as `PerExampleGradients` records them."""

    def __init__(self, params: Iterable[nn.Parameter]):
        self.params = list(params)
        self.clear()

    def clear(self) -> None:
        """Forget everything recorded, and so free its memory."""
        self._batch: int | None = None
        self.scale = 1.0
        """What the losses were multiplied by, and with them all that is kept here."""
        # By position in `params`; vectors (B, numel) are the per-example gradients of biases and LayerNorms.
        self._vectors: dict[int, Tensor] = {}
        self._products: list[OuterProducts] = []
        self._rows: dict[int, Rows] = {}

    @property
    def batch_size(self) -> int:
        """B of what was recorded. RuntimeError before anything was."""
        if self._batch is None:
            raise RuntimeError("per-example gradients: call record() and backward() first")
        return self._batch

    @torch.no_grad()
    def squared_norms(self) -> Tensor:
        """‖g_i‖² over all counted parameters together: (B,), float32 (float64 for a float64 model)."""
        with self._full_precision():
            return self._without_scale(self._squared_norms(self._products), 2)

    def _squared_norms(self, of: Sequence[OuterProducts]) -> Tensor:
        total = self._zeros(self.batch_size)
        if self._vectors:
            vectors = torch.cat(list(self._vectors.values()), 1)
            total += torch.linalg.vecdot(vectors, vectors)
        if launches_cost(total.device) and all(len(products.right) == self.batch_size for products in of):
            norms = [found.squared_norms().view(-1, self.batch_size) for found in OuterProducts.layers_of(of)]
            total += torch.cat(norms).sum(0) if norms else 0
        else:
            for products in of:
                total[products.examples] += products.squared_norms()
        for k, rows in self._rows.items():
            total += rows.squared_norms()
            for products in of:
                if k in products.lefts:  # a tied weight: twice the product of its two parts
                    tied = rows.gram_with(products.left(k), products.right)
                    total[products.examples] += 2 * tied[:, products.examples].diagonal()
        return total.clamp_(min=0)  # rounding can leave −1e-12 where the gradient is zero

    @torch.no_grad()
    def dots(self, direction: Sequence[Tensor | None]) -> Tensor:
        """g_i · direction: (B,); `direction` is aligned with `params`, None standing for zeros.

        Costs as much as a forward pass. Along a weighted gradient it equals `gram() @ weights`.
        """
        with self._full_precision():
            return self._without_scale(self._dots(direction, self._products))

    def _dots(self, direction: Sequence[Tensor | None], of: Sequence[OuterProducts]) -> Tensor:
        total = self._zeros(self.batch_size)
        for k, vector in self._vectors.items():
            if (d := direction[k]) is not None:
                total += vector @ d.flatten().to(vector.dtype)
        for products in of:
            along = {k: d.flatten(1) for k in products.lefts if (d := dense(direction[k])) is not None}
            if along:
                total[products.examples] += products.dots(along)
        for k, rows in self._rows.items():
            if (d := direction[k]) is not None:
                found = (d.coalesce() if d.is_sparse else d).index_select(0, rows.ids)
                total += rows.per_example((rows.values * (found.to_dense() if found.is_sparse else found)).sum(1))
        return total

    @torch.no_grad()
    def squared_norms_and_mean_dots(self) -> tuple[Tensor, Tensor]:
        """(‖g_i‖², g_i · g), each (B,), with g the mean gradient: `squared_norms()` and `gram().mean(1)`, each weight
        matrix in the cheaper way: by the products of all its tokens where these are few, else by way of g."""
        norms, dots = self._zeros(2, self.batch_size)
        far: list[OuterProducts] = []
        with self._full_precision():
            for group in WeightGroup.of(self._products):
                if group.few_tokens and not self._rows.keys() & set(group.keys):
                    gram = group.gram_by_tokens(self.batch_size)
                    norms += gram.diagonal()
                    dots += gram.mean(1)
                else:
                    far += [part._replace(lefts={k: part.lefts[k] for k in group.keys}) for part in group.parts]
            norms += self._squared_norms(far)
            dots += self._dots(self._sums(1 / self.batch_size, far), far)
        return self._without_scale(norms.clamp_(min=0), 2), self._without_scale(dots, 2)

    @torch.no_grad()
    def gram(self) -> Tensor:
        """g_i · g_j: (B, B). Costs about as much as a backward pass."""
        total = self._zeros(self.batch_size, self.batch_size)
        with self._full_precision():
            for vector in self._vectors.values():
                total += vector @ vector.mT
            for group in WeightGroup.of(self._products):
                total += group.gram(self.batch_size)
            for k, rows in self._rows.items():
                total += rows.gram()
                for products in self._products:
                    if k in products.lefts:
                        tied = rows.gram_with(products.left(k), products.right)
                        total[products.examples] += tied
                        total[:, products.examples] += tied.mT
        return self._without_scale(total, 2)

    @torch.no_grad()
    def weighted_gradient(self, weights: Tensor, by_rows: bool = False) -> list[Tensor]:
        """Σ_i weights[i] g_i, aligned with `params` and in their dtypes; zeros for an unused parameter.

        `weights` (B,) may be any real numbers. Half-precision products are rounded as autograd's own are. `by_rows`:
        an untied embedding's is sparse.
        """
        with self._full_precision():
            sums = self._sums(weights, self._products)
        return [
            torch.zeros_like(p)
            if value is None
            else self._without_scale((value if value.is_sparse else value.view_as(p)).to(p.dtype))
            for p, value in zip(self.params, whole(sums, by_rows), strict=True)
        ]

    def _sums(self, weights: Tensor | float, of: Sequence[OuterProducts]) -> list[Tensor | None]:
        """Σ_i weights[i] g_i as they come, None where unused; one number counts for all examples."""
        sums: list[Tensor | None] = [None] * len(self.params)
        for products in of:
            products.add_to(sums, weights[products.examples] if isinstance(weights, Tensor) else weights)
        for k, rows in self._rows.items():
            value = rows.weighted_sum(weights, len(self.params[k]))
            earlier = sums[k]
            sums[k] = value if earlier is None else earlier + value
        for k, vector in self._vectors.items():
            sums[k] = weights.to(vector.dtype) @ vector if isinstance(weights, Tensor) else vector.sum(0) * weights
        return sums

    def minus(self, other: "GradientFactors") -> "GradientFactors":
        """The differences g_i − h_i to the gradients of another pass over the same batch, to be used like gradients."""
        difference = GradientFactors(self.params)
        difference._batch, difference.scale = self._batch, self.scale
        if self._vectors.keys() != other._vectors.keys() or len(self._products) != len(other._products):
            raise ValueError("two passes over one batch ran different layers: their gradients have no difference")
        difference._vectors = {k: vector - other._vectors[k] for k, vector in self._vectors.items()}
        difference._products = [a.minus(b) for a, b in zip(self._products, other._products, strict=True)]
        difference._rows = {k: rows.minus(other._rows[k]) for k, rows in self._rows.items()}
        return difference

    @contextmanager
    def _full_precision(self) -> Iterator[None]:
        """Autocast off, should the caller be inside it; and TF32 for what came from half precision, which loses none of
        it."""
        half = any(left.dtype.itemsize < 4 for products in self._products for left in products.lefts.values())
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), tf32_products(half):
            yield

    def _without_scale(self, value: Tensor, power: int = 1) -> Tensor:
        return value if self.scale == 1 else value / self.scale**power

    def _zeros(self, *shape: int) -> Tensor:
        like = self.params[0]
        return torch.zeros(shape, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))

    def _apart_from_vectors(self, products: Iterable[OuterProducts]) -> list[OuterProducts]:
        """All but what is of a convolution that was formed in another of its uses or pieces, and is so here too."""
        found = []
        for part in products:
            for k in part.lefts.keys() & self._vectors.keys():
                (gradient,) = part.rows(k, part.lefts[k].shape[2])
                self._vectors[k][part.examples] += gradient
            found.append(part._replace(lefts={k: left for k, left in part.lefts.items() if k not in self._vectors}))
        return [part for part in found if part.lefts]


def joined(pieces: Sequence[GradientFactors]) -> GradientFactors:
    """Those of a batch whose pieces, in this order, were recorded one by one. They share memory."""
    if len(pieces) == 1:
        return pieces[0]
    batch = GradientFactors(pieces[0].params)
    batch._batch, batch.scale = sum(piece.batch_size for piece in pieces), pieces[0].scale
    parts: dict[int, list[Rows]] = defaultdict(list)
    start = 0
    for piece in pieces:
        end = start + piece.batch_size
        for k, vector in piece._vectors.items():
            if k not in batch._vectors:
                batch._vectors[k] = vector.new_zeros(batch.batch_size, vector.shape[1])
            batch._vectors[k][start:end] = vector
        batch._products += [products._replace(start=start + products.start) for products in piece._products]
        for k, rows in piece._rows.items():
            parts[k].append(rows._replace(examples=rows.examples + start))
        start = end
    batch._products = batch._apart_from_vectors(batch._products)
    for k, several in parts.items():
        joined = [torch.cat([getattr(one, name) for one in several]) for name in ("examples", "ids", "values")]
        sizes = [size for one in several for size in one.sizes or []]
        batch._rows[k] = Rows(joined[0], joined[1], joined[2], batch.batch_size, sizes)
    return batch
