"""Where passes are looked into: hooks on a model's layers, and a function that hands an output's gradient over."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..text import first_line
from .casts import Casts
from .layer_kinds import EMBEDDING, LOOKUP, Bare, Lookups, See, kind_of
from .relative_positions import positions_apart


class Unsupported(TypeError, RuntimeError):
    """The model has something that the formulas are not for; one line."""


class Tap(torch.autograd.Function):
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
        if receive is not None:  # the first time
            receive(grad)
        return grad, None, None


@contextmanager
def hooked(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]], see: See, examples: Callable[[], int | None]
) -> Iterator[None]:
    """Inside, `see` sees, and may replace, what the modules put out; indices that all examples share are looked up for
    each of `examples()`, where their number is known. Raises Unsupported where the model does not take that."""
    expanded: set[str] = set()

    def expand(name: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # Broadcasting after the lookup would sum the output gradient over the batch: no example axis.
        ids, size = args[0] if args else kwargs["input"], examples()
        if size and size > 1 and ids.dim() and ids.shape[0] == 1:
            expanded.add(name)
            return (ids.expand(size, *ids.shape[1:]),), {}
        return None

    with ExitStack() as contexts:
        for name, module in modules:
            kind = kind_of(module)
            if isinstance(module, Bare):
                expanded.add(name)
                contexts.enter_context(module.copied(name, see, examples))
                continue
            if kind is EMBEDDING:
                contexts.enter_context(module.register_forward_pre_hook(partial(expand, name), with_kwargs=True))
            if kind != LOOKUP:
                # Before the model's own hooks, which may make something else of what the layer puts out.
                contexts.enter_context(module.register_forward_hook(partial(see, name), prepend=True, with_kwargs=True))
        if any(kind_of(module) == LOOKUP for _, module in modules):
            contexts.enter_context(Lookups(modules, see, examples))
        contexts.enter_context(positions_apart(model, examples))
        try:
            yield
        except Exception as error:  # as where the one output is then repeated for all examples, by prompts of peft
            # A mistake of the closure's own comes again, in its own words, from passes without this.
            if not expanded or isinstance(error, (Unsupported, torch.OutOfMemoryError)):
                raise
            raise Unsupported(
                f"per-example gradients: {' or '.join(map(repr, expanded))} serves all examples at once, and "
                f"not each ({first_line(error)})"
            ) from error


def uses_in_graph(losses: Tensor) -> Counter[int]:
    """How often each parameter, by id, is used on the way to the losses. RuntimeError where a checkpoint hides it."""
    # Each use of a weight is one edge to it in autograd's graph, or to the cast of it that autocast shares among them.
    edges: Counter[int] = Counter()
    seen, stack = {losses.grad_fn}, [losses.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError("per-example gradients: checkpointing needs use_reentrant=False")
        for following, place in node.next_functions:
            if isinstance(following, Casts._backward_cls):  # of many weights: the one that this use is of
                following = following.next_functions[place][0]
            if following is None:
                continue
            cast = following.next_functions[0][0] if following.name() == "ToCopyBackward0" else None
            leaf = cast if cast is not None and hasattr(cast, "variable") else following
            if hasattr(leaf, "variable"):
                edges[id(leaf.variable)] += 1
            elif following not in seen:
                seen.add(following)
                stack.append(following)
    return edges
