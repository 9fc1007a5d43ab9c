"""Exact per-example gradients from one backward pass, and forward passes in which each example has its own weights.

The per-example gradients themselves are never formed. What is kept are their factors, a linear layer's inputs
a (B, T, n) and output gradients δ (B, T, m) of T tokens; `factors` has their norms, products and weighted sums.

The factors give each example its own weights w + c_i g_i in one batched pass, too: the layer's outputs gain
c_i Σ_s (a_is·x_it) δ_is, two T × T products instead of B copies of the weights [derived here].

A convolution is a linear layer over patches, with its positions for tokens. Where these are so many that g_i has
fewer numbers than its factors (Bu et al. 2022, arXiv 2205.10683), it is formed, and so is what it adds to the outputs,
by a convolution with B times as many groups (Rochette et al. 2019, arXiv 1912.06015).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import factors
from .factors import GradientFactors
from .gradients import outside_autocast, wide
from .layer_kinds import (
    EMBEDDING,
    LINEAR,
    NORM,
    TURNED,
    Bare,
    few_tokens,
    inputs,
    kind_of,
    own_gradients,
    own_outputs,
    shaped,
    tokens,
)
from .outer_products import OuterProducts, Rows, alike, stacked
from .relative_positions import positions_apart
from .taps import Tap, Unsupported, hooked, uses_in_graph

SMALL = 2**21
"""Numbers of an output whose gradient waits for those of layers like it: of more, one alone keeps a GPU busy."""
SHORT = 2**14
"""Numbers of a bias or a scale: so long at most are the vectors that are scaled together, in one copy more."""
_proven: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Bare parameters of which `PerExampleGradients._prove` has shown that its copies stay apart, by module."""


class PerExampleGradients(GradientFactors):
    """Per-example gradients g_i = ∇losses[i] of a model of Linear, Conv2d, LayerNorm, Embedding and kin: `layer_kinds`.

        gradients = PerExampleGradients(model)
        with gradients.record():
            losses = per_example_losses(model, batch)              # (B,)
        gradients.backward(losses)                                 # output gradients only; no `.grad`
        norms = gradients.squared_norms().sqrt()                   # (B,)
        ascent = gradients.weighted_gradient(norms / norms.sum())  # Σ_i p_i g_i, one tensor per parameter
        with gradients.perturbed(rho / norms):                     # example i at w + ρ g_i/‖g_i‖
            worst = per_example_losses(model, batch)               # (B,), differentiable as ever

    `losses[i]` must depend on example i alone (no batch norm), and the output of every module that owns a
    counted parameter must have the B examples as its leading dimension. An Embedding whose indices have
    leading dimension 1 (Hugging Face's position ids) is expanded to the batch. A leading dimension other than
    B is an error; one that is B by chance is not noticed here (`examples_apart.require_own_gradients`).
    A bare parameter of leading dimension 1 (ViT's position embeddings) is expanded alike while its module runs; that
    each copy reaches its own example alone is shown once, by a second backward pass, or Unsupported is raised.
    A parameter that has several uses (tied weights, a module called twice) gets all cross terms.
    """

    def __init__(self, model: nn.Module, params: Iterable[nn.Parameter] | None = None):
        """`params`: the parameters that count, by default all that require a gradient.

        Raises TypeError naming a module that owns such a parameter and is none of these,
        ValueError for a parameter that is not the model's. One that is frozen later contributes nothing.
        """
        super().__init__([p for p in model.parameters() if p.requires_grad] if params is None else params)
        self._model = model
        self._positions = {id(p): k for k, p in enumerate(self.params)}
        self._modules = []
        owned: set[int] = set()
        bare: set[int] = set()
        others = []
        for name, module in model.named_modules():
            own = {id(p): which for which, p in module.named_parameters(recurse=False)}
            own = {p: which for p, which in own.items() if p in self._positions}
            if kind_of(module) is not None and set(own.values()) <= {"weight", "bias"}:
                self._modules.append((name, module))
                owned |= own.keys()
            else:
                others.append((name, module, own))
        for name, module, own in others:
            left = own.keys() - owned  # what it only shares with a Linear is fine (the bias of BERT's decoder)
            if not all(Bare.fits(module, own[p]) for p in left):
                raise Unsupported(
                    f"per-example gradients: module '{name}' ({type(module).__name__}) owns parameters "
                    f"({', '.join(own.values())}) but is none of the layers that there are formulas for"
                )
            self._modules += [(f"{name}.{own[p]}".lstrip("."), Bare(module, own[p])) for p in own if p in left]
            bare |= left
        unowned = self._positions.keys() - owned - bare
        if unowned:
            raise ValueError(f"per-example gradients: {len(unowned)} of the parameters are not the model's")
        owners = Counter(id(p) for _, module in self._modules for p in module.parameters(recurse=False))
        self._unshared = {m for _, m in self._modules if all(owners[id(p)] == 1 for p in m.parameters(recurse=False))}
        self.clear()

    def clear(self) -> None:
        """Forget everything recorded, and so free its memory."""
        super().clear()
        self.square = False
        """Whether what was recorded may have as many tokens as examples, so that its shapes do not tell these apart."""
        self._uses: list[tuple[str, int]] = []  # module name, leading dimension of its output
        self._use_counts: Counter[int] = Counter()  # uses of each parameter, by id
        self._copies: list[tuple[Bare, Tensor]] = []  # of bare parameters
        # A useless leaf that every tap depends on: asking autograd for its gradient alone makes the engine
        # visit every tap and compute no parameter gradient on the way.
        self._anchor = torch.zeros((), requires_grad=True)
        # By position in `params`: each use of a Linear weight (δ, a), of an embedding (indices, δ, padding).
        self._factors: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        # Where launches cost, what is computed for all layers at once: of a bias (δ), of a LayerNorm's weight (x, δ).
        self._sums_later: list[tuple[int, Tensor]] = []
        self._norms_later: list[tuple[int, nn.Module, Tensor, Tensor]] = []
        self._lookups: dict[int, list[tuple[Tensor, Tensor, int | None]]] = defaultdict(list)

    @contextmanager
    def record(self, batch_size: int | None = None):
        """Record the model's forward passes inside the context; hooks are on only there, also if it raises.

        `batch_size` is needed only if the forward does not go through the model's own `__call__`, from whose
        arguments it is read otherwise, and then only to expand indices of leading dimension 1.
        """
        self.clear()
        self._batch = batch_size
        handle = self._model.register_forward_pre_hook(self._read_batch_size, with_kwargs=True)
        try:
            with hooked(self._model, self._modules, self._tap, lambda: self._batch):
                yield self
        except BaseException:
            self.clear()
            raise
        finally:
            handle.remove()

    @torch.no_grad()
    def backward(self, losses: Tensor, scale: float = 1.0) -> None:
        """Compute and keep the output gradients; `losses` (B,) come from the recorded forward.

        `scale`, a power of two, keeps float16 gradients from underflow, as a GradScaler does; it is in no result.
        Frees the graph. Raises ValueError if `losses` is not one-dimensional, and RuntimeError if an output's
        leading dimension is not B or if a counted parameter is used other than by calling its module.
        """
        if losses.dim() != 1:
            raise ValueError(f"per-example gradients: losses must have shape (B,), not {tuple(losses.shape)}")
        self._batch, self.scale = len(losses), scale
        for name, leading in self._uses:
            if leading != self.batch_size:
                raise Unsupported(
                    f"per-example gradients: the output of '{name}' has leading dimension {leading}, not "
                    f"the batch size {self.batch_size}"
                )
        self._check_that_all_uses_were_recorded(losses)
        with torch.enable_grad():
            total = losses.sum() if scale == 1 else losses.sum() * scale
        again = positions_apart(self._model, lambda: self._batch)  # where checkpointed layers run once more
        places = [bare.place for bare, _ in self._copies]
        unproven = len(losses) > 1 and any(which not in _proven.get(module, ()) for module, which in places)
        with again, outside_autocast(total.device):
            torch.autograd.grad(total, self._anchor, allow_unused=True, retain_graph=unproven)
        self._gather()
        if unproven:
            self._prove(losses)
        self._copies.clear()

    def like(self) -> "PerExampleGradients":
        """One for another pass of the same model and parameters, with nothing recorded."""
        return PerExampleGradients(self._model, self.params)

    @contextmanager
    def perturbed(self, scales: Tensor) -> Iterator[None]:
        """Inside, example i of the batch meets the weights w + scales[i] g_i; `scales` (B,).

        The model's outputs are those of B models with these weights, and so are gradients with respect to a
        parameter, summed over them: of mean losses, mean_i ∇ℓ_i(w + scales[i] g_i). The perturbations are constants.
        The weights themselves are not touched. Forwards must be of as many examples in the same order; with the same
        number of tokens T one costs about 1 + T (m + n)/(m n) of a plain one, for layers of m × n.
        `record()` may be entered inside. A checkpointed model's backward pass, too, must happen inside.
        """
        scales = self._without_scale(scales.detach()).view(-1, 1, 1)
        products = {k: group for group in self._products for k in group.lefts}
        scaled: dict[int, tuple[Tensor, Tensor]] = {}
        if factors.launches_cost(scales.device):
            narrow: dict[torch.dtype, Tensor] = {}
            for group in self._products:
                dtype = next(iter(group.lefts.values())).dtype
                right = torch.mul(
                    group.right, scales, out=torch.empty_like(group.right, dtype=dtype)
                )  # no copy between
                if dtype not in narrow:
                    narrow[dtype] = scales.to(dtype)
                scaled |= dict.fromkeys(group.lefts, (right, narrow[dtype]))
        vectors: dict[int, Tensor] = {}
        if factors.launches_cost(scales.device):
            short = {k: vector for k, vector in self._vectors.items() if vector.shape[1] < SHORT}
            if short:
                together = torch.cat(list(short.values()), 1)[:, None] * scales
                parts = together.split([vector.shape[1] for vector in short.values()], 2)
                vectors = dict(zip(short, parts, strict=True))
        perturb = partial(self._perturb, scales, products, scaled, vectors)
        with hooked(self._model, self._modules, perturb, lambda: self._batch):
            yield

    def _perturb(
        self, scales: Tensor, products: dict, scaled: dict, vectors: dict, name: str, module, args, kwargs, output
    ):
        """`products`: weight's position -> those that it is in; `scaled`: -> (scales · their right side, scales);
        `vectors`: position -> scales · vector (B, 1, numel), where that is there already."""

        def vector(k: int) -> Tensor:
            return vectors[k] if k in vectors else self._vectors[k][:, None] * scales

        weight, bias = self._counted(module)
        if weight is None and bias is None:
            return None
        x = args[0] if args else kwargs["input"]
        if len(x) != self.batch_size:
            raise Unsupported(
                f"per-example gradients: '{name}' was given {len(x)} examples, not the {self.batch_size} recorded"
            )
        terms = []
        kind = kind_of(module)
        if isinstance(module, EMBEDDING):
            ids = x.reshape(self.batch_size, -1)
            if weight in self._rows:
                terms.append(self._rows[weight].lookups(ids, scales))
            if weight in products:
                terms.append(products[weight].lookups(weight, ids, scales))
        elif weight in self._vectors:
            terms.append(own_outputs(module, x, vector(weight)))
        elif weight is not None:
            x = inputs(module, x)
            x = x.reshape(self.batch_size, -1, x.shape[-1])
            if weight in scaled and kind == LINEAR and weight not in self._rows and module in self._unshared:
                right, alike = scaled[weight]
                both = alike if bias in self._vectors else None
                moved = products[weight].moved(weight, x, right, both, tokens(module, output))
                return shaped(module, moved, output)
            if weight in products:
                outputs = products[weight].turned_outputs if kind == TURNED else products[weight].outputs
                terms.append(outputs(weight, x, scales))
            if weight in self._rows:
                if kind == TURNED:
                    raise Unsupported(f"per-example gradients: '{name}' is tied to an embedding the other way round")
                terms.append(self._rows[weight].outputs(x, output.shape[-1], scales))
        if bias in self._vectors:
            terms.append(vector(bias))
        moved = tokens(module, output)
        for term in terms:
            moved = moved + term.to(moved.dtype)
        return shaped(module, moved, output)

    def _read_batch_size(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        shapes = [x.shape for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        self.square |= any(len(shape) > 1 and shape[0] == shape[1] for shape in shapes)
        if self._batch is None:
            self._batch = max((shape[0] for shape in shapes), default=None)

    def _counted(self, module: nn.Module) -> list[int | None]:
        """Positions of the module's weight and bias, None for what does not count."""
        own = [getattr(module, which, None) for which in ("weight", "bias")]
        return [self._positions.get(id(p)) if p is not None and p.requires_grad else None for p in own]

    def _tap(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        counted = self._counted(module)
        if counted == [None, None] or not torch.is_grad_enabled():
            return None
        self._uses.append((name, output.shape[0] if output.dim() else 0))
        self.square |= output.dim() > 2 and output.shape[0] == output.shape[1]
        self._use_counts.update(id(self.params[k]) for k in counted if k is not None)
        x = args[0] if args else kwargs["input"]
        if isinstance(module, Bare):
            self._copies.append((module, output))
        return Tap.apply(output, self._anchor, partial(self._receive, module, counted, x))

    def _receive(self, module: nn.Module, counted: list[int | None], x: Tensor, grad: Tensor) -> None:
        weight, bias = counted
        kind = kind_of(module)
        if isinstance(module, EMBEDDING):
            if weight is not None:
                self._lookups[weight].append((x, grad, module.padding_idx))
            return
        each = tokens(module, grad)
        later = factors.launches_cost(grad.device) and grad.numel() <= SMALL
        if weight is not None and later and kind == NORM:
            self._norms_later.append((weight, module, x.detach(), grad))
        elif weight is not None and not few_tokens(module, grad):
            with self._full_precision():
                self._add_vector(weight, own_gradients(module, wide(x.detach()), wide(grad)))
        elif weight is not None and kind == TURNED:
            self._factors[weight].append((x.detach().reshape(*each.shape[:2], -1).to(grad.dtype), each))
        elif weight is not None:
            self._factors[weight].append((each, inputs(module, x)))
        if bias is not None and later:
            self._sums_later.append((bias, each))
        elif bias is not None:
            self._add_vector(bias, each.sum(1, dtype=torch.promote_types(each.dtype, torch.float32)))

    def _prove(self, losses: Tensor) -> None:
        """That an example's copy of a bare parameter reaches that example's loss alone, by one more backward pass: then
        the gradient of Σ_i c_i losses[i] in the copies is c_i g_i. Raises Unsupported where it is not."""
        weights = torch.linspace(-1, 1, self.batch_size, device=losses.device, dtype=losses.dtype)
        with torch.enable_grad():
            total = losses @ (weights * self.scale)
        found = torch.autograd.grad(total, [copies for _, copies in self._copies], allow_unused=True)
        rest = {k: vector * weights[:, None] for k, vector in self._vectors.items()}
        for (bare, _), grad in zip(self._copies, found, strict=True):
            if grad is not None:
                rest[self._positions[id(bare.bias)]] -= tokens(bare, grad)[:, 0]
        for bare, _ in self._copies:
            module, which = bare.place
            k = self._positions[id(bare.bias)]
            if k in rest and (size := self._vectors[k].norm()) > 0:  # zero proves nothing
                if rest[k].norm() > 0.05 * size:  # rounding in half precision is less
                    raise Unsupported(
                        f"per-example gradients: '{which}' of {type(module).__name__} is not met example by example"
                    )
                _proven.setdefault(module, set()).add(which)

    def _add_vector(self, k: int, vector: Tensor) -> None:
        self._vectors[k] = vector if k not in self._vectors else self._vectors[k] + vector

    def _form_vectors(self) -> None:
        """Those that were left for later, of layers that are alike at once."""
        found: list[tuple[int, Tensor]] = []
        for sums in alike(self._sums_later, lambda one: one[1:]):
            of_all = stacked([each for _, each in sums]).sum(1).split(self.batch_size)
            found += zip((k for k, _ in sums), of_all, strict=True)
        settings = defaultdict(list)
        for one in self._norms_later:
            settings[one[1].normalized_shape, one[1].eps].append(one)
        with self._full_precision():
            for norms in chain.from_iterable(alike(of, lambda one: one[2:]) for of in settings.values()):
                ks, modules, xs, grads = zip(*norms, strict=True)
                of_all = own_gradients(modules[0], stacked(xs), stacked(grads)).split(self.batch_size)
                found += zip(ks, of_all, strict=True)
        for k, vector in found:
            self._add_vector(k, vector)
        self._sums_later.clear()
        self._norms_later.clear()

    def _gather(self) -> None:
        """Join a parameter's uses along the tokens, and weights that share an input (query, key, value)."""
        self._form_vectors()
        by_input: dict[tuple[int, torch.dtype], OuterProducts] = {}
        for k, uses in self._factors.items():
            # Detached, since an activation would otherwise keep the graph alive.
            rights = [x.detach().reshape(self.batch_size, -1, x.shape[-1]) for _, x in uses]
            if len(uses) == 1:
                left, x = uses[0]
                by_input.setdefault((id(x), left.dtype), OuterProducts(rights[0], {})).lefts[k] = left
            else:
                left = torch.cat([left for left, _ in uses], 1)
                by_input[id(left), left.dtype] = OuterProducts(torch.cat(rights, 1), {k: left})
        self._products = self._apart_from_vectors(by_input.values())
        for k, lookups in self._lookups.items():
            self._rows[k] = Rows.of(lookups, self.batch_size)
        self._factors.clear()
        self._lookups.clear()

    def _check_that_all_uses_were_recorded(self, losses: Tensor) -> None:
        edges = uses_in_graph(losses)
        for name, p in self._model.named_parameters():
            if id(p) in self._positions and edges[id(p)] > self._use_counts[id(p)]:
                raise Unsupported(f"per-example gradients: '{name}' is also used without calling its module")
