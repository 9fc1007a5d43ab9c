"""Exact per-example gradient norms, products and weighted sums from one backward pass.

The per-example gradients themselves are never formed. A linear layer's is a sum of outer products over the
tokens t, g_i = Σ_t δ_it a_itᵀ, of its input a (B, T, n) and its output gradient δ (B, T, m). So
‖g_i‖² = Σ_ts (a_it·a_is)(δ_it·δ_is) needs only two T × T products (Goodfellow 2015, arXiv 1510.01799, for
T = 1; Li et al. 2021, arXiv 2110.05679, "ghost clipping"), and Σ_i p_i g_i, with weights p chosen once the
norms are known, is one product of stored tensors (Bu et al. 2022, arXiv 2210.00038, "book-keeping").
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

SUPPORTED = (nn.Linear, nn.LayerNorm, nn.Embedding)
GHOST_BLOCK = 64  # tokens in a block of a ghost norm
BLOCK = 2**22  # numbers held at a time where forming the gradient itself is cheaper than the ghost norm


class PerExampleGradients:
    """Per-example gradients g_i = ∇losses[i] of a model of Linear, LayerNorm and Embedding.

        gradients = PerExampleGradients(model)
        with gradients.record():
            losses = per_example_losses(model, batch)              # (B,)
        gradients.backward(losses)                                 # output gradients only; no `.grad`
        norms = gradients.squared_norms().sqrt()                   # (B,)
        ascent = gradients.weighted_gradient(norms / norms.sum())  # Σ_i p_i g_i, one tensor per parameter

    `losses[i]` must depend on example i alone (no batch norm), and the output of every module that owns a
    counted parameter must have the B examples as its leading dimension. An Embedding whose indices have
    leading dimension 1 (Hugging Face's position ids) is expanded to the batch. A leading dimension other than
    B is an error; one that is B by chance (a relative-position table of T = B rows) cannot be noticed.
    A parameter that has several uses (tied weights, a module called twice) gets all cross terms.
    """

    def __init__(self, model: nn.Module, params: Iterable[nn.Parameter] | None = None):
        """`params`: the parameters that count, by default all that require a gradient.

        Raises TypeError naming a module that owns such a parameter and is not Linear, LayerNorm or Embedding,
        ValueError for a parameter that is not the model's. One that is frozen later contributes nothing.
        """
        self.params = [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
        self._model = model
        self._positions = {id(p): k for k, p in enumerate(self.params)}
        self._modules = []
        owned, others = set(), []
        for name, module in model.named_modules():
            own = {id(p): which for which, p in module.named_parameters(recurse=False)}
            own = {p: which for p, which in own.items() if p in self._positions}
            # A subclass with its own forward (an adapter, say) is not the layer that the formulas are for.
            if (
                any(type(module).forward is kind.forward for kind in SUPPORTED)
                and set(own.values()) <= {"weight", "bias"}
                and not getattr(module, "scale_grad_by_freq", False)
            ):
                self._modules.append((name, module))
                owned |= own.keys()
            else:
                others.append((name, module, own))
        for name, module, own in others:
            if own.keys() - owned:  # what it only shares with a Linear is fine (the bias of BERT's decoder)
                raise TypeError(
                    f"per-example gradients: module '{name}' ({type(module).__name__}) owns parameters "
                    f"({', '.join(own.values())}) but is not a plain Linear, LayerNorm or Embedding"
                )
        unowned = self._positions.keys() - owned
        if unowned:
            raise ValueError(f"per-example gradients: {len(unowned)} of the parameters are not the model's")
        self.clear()

    def clear(self) -> None:
        """Forget everything recorded, and so free its memory."""
        self.batch_size = None
        self._uses: list[tuple[str, int]] = []  # module name, leading dimension of its output
        self._use_counts = Counter()  # uses of each parameter, by id
        # A useless leaf that every tap depends on: asking autograd for its gradient alone makes the engine
        # visit every tap and compute no parameter gradient on the way.
        self._anchor = torch.zeros((), requires_grad=True)
        # By position in `params`: each use of a Linear weight (δ, a), of an embedding (indices, δ, padding).
        self._factors: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._lookups: dict[int, list[tuple[Tensor, Tensor, int | None]]] = defaultdict(list)
        # After the backward pass; vectors (B, numel) are the per-example gradients of biases and LayerNorms.
        self._vectors: dict[int, Tensor] = {}
        self._products: list[_Products] = []
        self._rows: dict[int, _Rows] = {}

    @contextmanager
    def record(self, batch_size: int | None = None):
        """Record the model's forward passes inside the context; hooks are on only there, also if it raises.

        `batch_size` is needed only if the forward does not go through the model's own `__call__`, from whose
        arguments it is read otherwise, and then only to expand indices of leading dimension 1.
        """
        self.clear()
        self.batch_size = batch_size
        handles = [self._model.register_forward_pre_hook(self._read_batch_size, with_kwargs=True)]
        try:
            for name, module in self._modules:
                if isinstance(module, nn.Embedding):
                    handles.append(module.register_forward_pre_hook(self._expand_indices, with_kwargs=True))
                handles.append(module.register_forward_hook(partial(self._tap, name), with_kwargs=True))
            yield self
        except BaseException:
            self.clear()
            raise
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def backward(self, losses: Tensor) -> None:
        """Compute and keep the output gradients; `losses` (B,) come from the recorded forward.

        Frees the graph. Raises ValueError if `losses` is not one-dimensional, and RuntimeError if an output's
        leading dimension is not B or if a counted parameter is used other than by calling its module.
        """
        if losses.dim() != 1:
            raise ValueError(f"per-example gradients: losses must have shape (B,), not {tuple(losses.shape)}")
        self.batch_size = len(losses)
        for name, leading in self._uses:
            if leading != self.batch_size:
                raise RuntimeError(
                    f"per-example gradients: the output of '{name}' has leading dimension {leading}, not "
                    f"the batch size {self.batch_size}; if its input is shared, pass record(batch_size=...)"
                )
        self._check_that_all_uses_were_recorded(losses)
        with torch.enable_grad():
            total = losses.sum()
        torch.autograd.grad(total, self._anchor, allow_unused=True)
        self._gather()

    @torch.no_grad()
    def squared_norms(self) -> Tensor:
        """‖g_i‖² over all counted parameters together: (B,), float32 (float64 for a float64 model)."""
        total = self._zeros(self.batch_size)
        with _full_precision():
            if self._vectors:
                vectors = torch.cat(list(self._vectors.values()), 1)
                total += torch.linalg.vecdot(vectors, vectors)
            for products in self._products:
                total += products.squared_norms()
            for k, rows in self._rows.items():
                total += rows.squared_norms()
                for products in self._products:
                    if k in products.lefts:  # a tied weight: twice the product of its two parts
                        total += 2 * rows.gram_with(products.left(k), products.right).diagonal()
        return total.clamp_(min=0)  # rounding can leave −1e-12 where the gradient is zero

    @torch.no_grad()
    def dots(self, direction: Sequence[Tensor | None]) -> Tensor:
        """g_i · direction: (B,); `direction` is aligned with `params`, None standing for zeros.

        Costs as much as a forward pass. Along a weighted gradient it equals `gram() @ weights`.
        """
        total = self._zeros(self.batch_size)
        with _full_precision():
            for k, vector in self._vectors.items():
                if direction[k] is not None:
                    total += vector @ direction[k].flatten().to(vector.dtype)
            for products in self._products:
                right = _wide(products.right)
                for k in products.lefts:
                    if direction[k] is not None:
                        outputs = F.linear(right, direction[k].to(right.dtype))
                        total += outputs.mul_(products.left(k)).sum((1, 2))
            for k, rows in self._rows.items():
                if direction[k] is not None:
                    total += rows.per_example((rows.values * direction[k][rows.ids]).sum(1))
        return total

    @torch.no_grad()
    def gram(self) -> Tensor:
        """g_i · g_j: (B, B). Costs about as much as a backward pass."""
        total = self._zeros(self.batch_size, self.batch_size)
        with _full_precision():
            for vector in self._vectors.values():
                total += vector @ vector.mT
            for products in self._products:
                for k in products.lefts:
                    total += products.gram(k)
            for k, rows in self._rows.items():
                total += rows.gram()
                for products in self._products:
                    if k in products.lefts:
                        tied = rows.gram_with(products.left(k), products.right)
                        total += tied + tied.mT
        return total

    @torch.no_grad()
    def weighted_gradient(self, weights: Tensor) -> list[Tensor]:
        """Σ_i weights[i] g_i, aligned with `params` and in their dtypes; zeros for an unused parameter.

        `weights` (B,) may be any real numbers. Half-precision products are rounded as autograd's own are.
        """
        sums: list[Tensor | None] = [None] * len(self.params)
        with _full_precision():
            for products in self._products:
                for k, value in products.weighted_sums(weights):
                    sums[k] = value
            for k, rows in self._rows.items():
                value = rows.weighted_sum(weights, len(self.params[k]))
                sums[k] = value if sums[k] is None else sums[k] + value
            for k, vector in self._vectors.items():
                sums[k] = weights.to(vector.dtype) @ vector
        return [
            torch.zeros_like(p) if value is None else value.to(p.dtype).view_as(p)
            for p, value in zip(self.params, sums, strict=True)
        ]

    def _zeros(self, *shape: int) -> Tensor:
        if not all(shape):
            raise RuntimeError("per-example gradients: call record() and backward() first")
        like = self.params[0]
        return torch.zeros(shape, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))

    def _read_batch_size(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.batch_size is None:
            leading = [x.shape[0] for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
            self.batch_size = max(leading, default=None)

    def _expand_indices(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # Broadcasting after the lookup would sum the output gradient over the batch: no example axis.
        ids = args[0] if args else kwargs["input"]
        if self.batch_size and ids.dim() and ids.shape[0] == 1:
            return (ids.expand(self.batch_size, *ids.shape[1:]),), {}
        return None

    def _tap(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        own = [getattr(module, which, None) for which in ("weight", "bias")]
        counted = [self._positions.get(id(p)) if p is not None and p.requires_grad else None for p in own]
        if counted == [None, None] or not torch.is_grad_enabled():
            return None
        self._uses.append((name, output.shape[0] if output.dim() else 0))
        self._use_counts.update(id(p) for p in own)
        x = args[0] if args else kwargs["input"]
        return _Tap.apply(output, self._anchor, partial(self._receive, module, counted, x))

    def _receive(self, module: nn.Module, counted: list[int | None], x: Tensor, grad: Tensor) -> None:
        weight, bias = counted
        if isinstance(module, nn.Embedding):
            self._lookups[weight].append((x, grad, module.padding_idx))
            return
        if isinstance(module, nn.Linear):
            grad = grad.reshape(self.batch_size, -1, module.out_features)
            if weight is not None:
                self._factors[weight].append((grad, x))
        else:
            grad = _wide(grad).reshape(self.batch_size, -1, prod(module.normalized_shape))
            if weight is not None:
                normalized = F.layer_norm(_wide(x), module.normalized_shape, eps=module.eps)
                self._add_vector(weight, normalized.reshape(grad.shape).mul_(grad).sum(1))
        if bias is not None:
            self._add_vector(bias, _wide(grad).sum(1))

    def _add_vector(self, k: int, vector: Tensor) -> None:
        self._vectors[k] = vector if k not in self._vectors else self._vectors[k] + vector

    def _gather(self) -> None:
        """Join a parameter's uses along the tokens, and weights that share an input (query, key, value)."""
        by_input: dict[tuple[int, torch.dtype], _Products] = {}
        for k, uses in self._factors.items():
            # Detached, since an activation would otherwise keep the graph alive.
            rights = [x.detach().reshape(self.batch_size, -1, x.shape[-1]) for _, x in uses]
            if len(uses) == 1:
                left, x = uses[0]
                by_input.setdefault((id(x), left.dtype), _Products(rights[0], {})).lefts[k] = left
            else:
                left = torch.cat([left for left, _ in uses], 1)
                by_input[id(left), left.dtype] = _Products(torch.cat(rights, 1), {k: left})
        self._products = list(by_input.values())
        for k, uses in self._lookups.items():
            self._rows[k] = _Rows.of(uses, self.batch_size)
        self._factors.clear()
        self._lookups.clear()

    def _check_that_all_uses_were_recorded(self, losses: Tensor) -> None:
        # Each use of a weight is one edge to it in autograd's graph (fewer where autocast shares a cast).
        edges, seen, stack = Counter(), {losses.grad_fn}, [losses.grad_fn]
        while stack:
            node = stack.pop()
            if node.name() == "CheckpointFunctionBackward":
                raise RuntimeError("per-example gradients: checkpointing needs use_reentrant=False")
            for following, _ in node.next_functions:
                if following is None:
                    continue
                if hasattr(following, "variable"):
                    edges[id(following.variable)] += 1
                elif following not in seen:
                    seen.add(following)
                    stack.append(following)
        for name, p in self._model.named_parameters():
            if id(p) in self._positions and edges[id(p)] > self._use_counts[id(p)]:
                raise RuntimeError(f"per-example gradients: '{name}' is also used without calling its module")


class _Tap(torch.autograd.Function):
    """The identity; its backward hands the output gradient to `receive`.

    The output is detached, not a view, so that an in-place operation on it stays above the tap in the graph.
    """

    @staticmethod
    def forward(ctx, output: Tensor, anchor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        return output.detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        receive, ctx.receive = ctx.receive, None  # `losses` keeps ctx: let it not keep the layer's input too
        receive(grad)
        return grad, None, None


class _Products(NamedTuple):
    """Linear weights that share an input: g_i = Σ_t left_itᵀ right_it, for each left."""

    right: Tensor  # (B, T, n), the input
    lefts: dict[int, Tensor]  # parameter's position -> (B, T, m), the output gradient

    def left(self, k: int) -> Tensor:
        return _wide(self.lefts[k])

    def blocks(self, k: int) -> Iterator[Tensor]:
        """The per-example gradients of weight k, some rows at a time: (B, rows, n)."""
        left, right = self.left(k), _wide(self.right)
        for part in left.split(max(1, BLOCK // (len(right) * right.shape[2])), 2):
            yield torch.bmm(part.mT, right)

    def squared_norms(self) -> Tensor:
        _, tokens, n = self.right.shape
        m = sum(left.shape[2] for left in self.lefts.values())
        if tokens * (m + n) >= m * n:
            return sum(block.square().sum((1, 2)) for k in self.lefts for block in self.blocks(k))
        right, lefts = _wide(self.right), [self.left(k) for k in self.lefts]
        total = right.new_zeros(len(right))
        for start in range(0, tokens, GHOST_BLOCK):  # symmetric: only blocks on and above the diagonal
            stop = start + GHOST_BLOCK
            of_lefts = torch.bmm(lefts[0][:, start:stop], lefts[0][:, start:].mT)
            for left in lefts[1:]:
                of_lefts.baddbmm_(left[:, start:stop], left[:, start:].mT)
            both = torch.bmm(right[:, start:stop], right[:, start:].mT).mul_(of_lefts)
            total += 2 * both.sum((1, 2)) - both[:, :, :GHOST_BLOCK].sum((1, 2))
        return total

    def gram(self, k: int) -> Tensor:
        left, right = self.left(k), _wide(self.right)
        batch, tokens, m, n = *left.shape, right.shape[2]
        if batch * tokens**2 * (m + n) >= (batch + tokens) * m * n:
            return sum(block.flatten(1) @ block.flatten(1).mT for block in self.blocks(k))
        left, right = left.flatten(0, 1), right.flatten(0, 1)
        return (left @ left.mT).mul_(right @ right.mT).view(batch, tokens, batch, tokens).sum((1, 3))

    def weighted_sums(self, weights: Tensor) -> Iterator[tuple[int, Tensor]]:
        dtype = next(iter(self.lefts.values())).dtype
        weights = weights.view(-1, 1, 1)
        right = self.right.flatten(0, 1).to(dtype)
        # Scale whichever side is the smaller to copy.
        scale_right = sum(left.shape[2] for left in self.lefts.values()) >= right.shape[1]
        if scale_right:
            right = (self.right * weights).flatten(0, 1).to(dtype)
        for k, left in self.lefts.items():
            left = left if scale_right else (left * weights).to(dtype)
            yield k, left.flatten(0, 1).mT @ right


class _Rows(NamedTuple):
    """An embedding's per-example gradients by their non-zero rows, R of them, sorted by example and index."""

    examples: Tensor  # (R,)
    ids: Tensor  # (R,)
    values: Tensor  # (R, n)
    batch_size: int

    @classmethod
    def of(cls, uses: list[tuple[Tensor, Tensor, int | None]], batch_size: int) -> "_Rows":
        ids = torch.cat([ids.reshape(batch_size, -1) for ids, _, _ in uses], 1)
        grads = [grad.reshape(batch_size, -1, grad.shape[-1]) for _, grad, _ in uses]
        grads = _wide(grads[0] if len(grads) == 1 else torch.cat(grads, 1)).flatten(0, 1)
        # One key per pair of example and index; the tokens of one pair are summed.
        size = int(ids.max()) + 1
        keys = ids + size * torch.arange(batch_size, device=ids.device)[:, None]
        keys, inverse = keys.flatten().unique(return_inverse=True)
        values = torch.ops.aten.embedding_dense_backward(grads, inverse, len(keys), -1, False)
        rows = cls(keys // size, keys % size, values, batch_size)
        for index in {
            padding for _, _, padding in uses if padding is not None
        }:  # autograd gives them nothing
            values.masked_fill_((rows.ids == index)[:, None], 0)
        return rows

    def per_example(self, of_rows: Tensor) -> Tensor:
        """Sum over each example's rows: (R,) -> (B,)."""
        return of_rows.new_zeros(self.batch_size).index_add_(0, self.examples, of_rows)

    def squared_norms(self) -> Tensor:
        return self.per_example(self.values.square().sum(1))

    def gram(self) -> Tensor:
        sizes = self.examples.bincount(minlength=self.batch_size).tolist()
        parts = zip(self.ids.split(sizes), self.values.split(sizes), strict=True)
        products = (((values @ self.values.mT) * (ids[:, None] == self.ids)).sum(0) for ids, values in parts)
        return torch.stack([self.per_example(product) for product in products])

    def gram_with(self, left: Tensor, right: Tensor) -> Tensor:
        """Products with a Linear's g_i of the same weight: left (B, T, V), right (B, T, n) -> (B, B)."""
        pairs = zip(left, _wide(right), strict=True)
        products = ((a @ self.values.mT).mul_(d[:, self.ids]).sum(0) for d, a in pairs)
        return torch.stack([self.per_example(product) for product in products])

    def weighted_sum(self, weights: Tensor, size: int) -> Tensor:
        values = self.values * weights.to(self.values.dtype)[self.examples, None]
        return torch.ops.aten.embedding_dense_backward(values, self.ids, size, -1, False)


def _wide(x: Tensor) -> Tensor:
    """In at least float32, in which inner products are accumulated."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _full_precision():
    """Autocast off, should the caller be inside it."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
