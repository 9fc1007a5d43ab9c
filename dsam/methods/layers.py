"""The top layers of an encoder on their own: passes that start from what the lower layers gave in an earlier pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..text import first_line
from .perturbation import Mark, RandomState

MOST = 4
LEFT_OUT = "its passes leave layers out (LayerDrop, or a head of several)"


class DoesNotFit(Exception):
    """Passes over the top layers of this model are not what its own would be; one line."""


class TopLayers:
    """The last `count` layers of a Hugging Face encoder and all that follows them (pooler, classifier).

        top = TopLayers(model, 2)
        top.find(run)                    # once: which parameters are theirs alone
        with top.record(k):
            losses = closure()           # keeps what the layers below gave, and the random state there
        with top.resume(k):
            again = closure()            # the layers below give it again, and the top draws the same dropout masks

    The model stays whole: its lower layers give what the last of them gave, whatever that is, so that no model needs
    to be known. Raises DoesNotFit where it has no stack of layers, and ValueError where that has fewer.
    """

    def __init__(self, model: nn.Module, count: int):
        self._stacks = stacks_of(model)
        longest = len(self._stacks[0])
        if count < 1:
            raise ValueError(f"layers must be at least 1, got {count}")
        if count > longest > 1:
            raise ValueError(f"layers={count}: {type(model).__name__} has {longest}")
        if count > longest:
            raise DoesNotFit(f"{type(model).__name__} has one layer, or one that all share")
        self.count, self.share = count, count / longest
        self.stack = self._stacks[0]
        self.params: list[nn.Parameter] | None = None
        self.unproven, self.looks = True, 0  # by `find`, whose losses may say nothing of the layers yet
        self._all = list(model.parameters())
        self._random = RandomState(self._all)
        self._kept: dict[int, tuple[Any, Mark]] = {}

    def find(self, losses: Callable[[], Tensor]) -> None:
        """Finds the parameters that a pass from the top layers on depends on, and one to them does not.

        Args:
            losses: runs the model on a batch, each time with the same masks.
        Raises DoesNotFit where a resumed pass is another than the whole one. Where no loss depends on the layers, as
        below a head that starts at 0, that shows nothing, and `unproven` stays, for `MOST` looks in all.
        """
        order: list[nn.ModuleList] = []
        with ExitStack() as hooks, torch.enable_grad():
            for stack in self._stacks:
                hooks.enter_context(stack[-1].register_forward_hook(lambda *_, stack=stack: order.append(stack)))
            losses()
        if not order:
            raise DoesNotFit("its layers are not called")
        self.stack = order[-1]  # of an encoder and a decoder, that whose layers come last
        entered = 0

        def enters(*_) -> None:
            nonlocal entered
            entered += 1

        with torch.enable_grad():
            with self._first.register_forward_pre_hook(enters), self.record(0, graph=True):
                whole = losses()
            if entered != 1:
                raise DoesNotFit("its layers share their weights")
            below = leaves(x for x in tree_leaves(self._kept[0][0]) if isinstance(x, Tensor))
            self._kept[0] = tree_map(_detached, self._kept[0][0]), self._kept[0][1]
            before = self._versions()
            try:
                with self.resume(0):
                    again = losses()
            except RuntimeError as error:  # whatever a layer that is none makes of another's output
                raise DoesNotFit(f"its layers cannot be passed over ({first_line(error)})") from None
        if self._versions() != before:
            raise DoesNotFit("it writes over what its layers give")
        signal = self._signal(losses, whole)
        self.clear()
        eps = torch.finfo(whole.dtype).eps
        with torch.no_grad():
            apart, size = (whole - again).abs(), 1 + whole.abs()
            beyond = (apart > 100 * eps * size).any() & (apart.max() > 0.1 * signal)
            if not (apart <= eps**0.6 * size).all() or beyond:
                raise DoesNotFit("a pass from its top layers on is not what a whole pass gives")
            self.looks += 1
            self.unproven = self.looks < MOST and bool(signal <= 1000 * eps * size.max())
        above = leaves([again]) - below
        self.params = [p for p in self._all if p in above]
        if not self.params:
            raise DoesNotFit("no parameter belongs to its top layers alone")

    @torch.no_grad()
    def _signal(self, losses: Callable[[], Tensor], whole: Tensor) -> Tensor:
        """How far the losses change where the layers below give nothing: not at all below a head that starts at 0."""
        given, mark = self._kept[0]
        self._kept[0] = tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, given), mark
        try:
            with self.resume(0):
                found = (losses() - whole).abs().max()
        except Exception:  # whatever the model makes of nothing; it looked at it
            found = torch.full_like(whole[0], torch.inf)
        return torch.where(found.isnan(), torch.inf, found)

    def _versions(self) -> list[int]:
        return [x._version for x in tree_leaves(self._kept[0][0]) if isinstance(x, Tensor)]

    @property
    def _first(self) -> nn.Module:
        return self.stack[-self.count]

    @contextmanager
    def record(self, key: int = 0, graph: bool = False) -> Iterator[None]:
        """`graph`: of what is kept, the graph as well. Raises DoesNotFit where a layer is left out of the pass."""
        kept: list[Any] = [None, None]
        keep = (lambda x: x) if graph else _detached

        def below(_, __, output) -> None:
            kept[0] = tree_map(keep, output)

        def first(_, args: tuple, kwargs: dict) -> None:
            kept[1] = self._random.mark()
            if self.count == len(self.stack):
                kept[0] = keep(hidden_of(args, kwargs))

        with ExitStack() as hooks:
            hooks.enter_context(self._first.register_forward_pre_hook(first, with_kwargs=True))
            if self.count < len(self.stack):
                # Before the model's own hooks, which run again where the pass is resumed.
                hooks.enter_context(self.stack[-self.count - 1].register_forward_hook(below, prepend=True))
            yield
        if kept[0] is None or kept[1] is None:
            raise DoesNotFit(LEFT_OUT)
        self._kept[key] = kept[0], kept[1]

    @contextmanager
    def resume(self, key: int = 0) -> Iterator[None]:
        """Draws inside begin where they began at the top layers, whatever was drawn below. Raises DoesNotFit where the
        pass leaves their first one out."""
        output, state = self._kept[key]
        entered = False
        own = next(p for p in self._first.parameters() if p.is_floating_point()).dtype

        def widened(x: Any) -> Any:  # what autocast left narrower goes on in the layer's own precision
            floating = isinstance(x, Tensor) and x.is_floating_point()
            return x.to(torch.promote_types(x.dtype, own)) if floating else x

        wide = tree_map(widened, output)

        def first(_, args: tuple, kwargs: dict):
            nonlocal entered
            entered = True
            self._random.return_to(state)
            return with_hidden(args, kwargs, wide) if self.count == len(self.stack) else None

        lower = list(self.stack)[: -self.count]
        patched = [layer for layer in lower if "forward" in vars(layer)]  # or compiled
        theirs: dict[nn.Module, dict[str, Any]] = {layer: {"forward": vars(layer)["forward"]} for layer in patched}
        with self._first.register_forward_pre_hook(first, with_kwargs=True):
            try:
                for layer in lower:
                    layer.forward = lambda *_, **__: wide  # type: ignore[method-assign]  # of this one alone
                yield
            finally:
                for layer in lower:
                    vars(layer).pop("forward", None)
                    vars(layer).update(theirs.get(layer, {}))
        if not entered:
            raise DoesNotFit(LEFT_OUT)

    def clear(self) -> None:
        """Lets go of what was kept."""
        self._kept.clear()


def stacks_of(model: nn.Module) -> list[nn.ModuleList]:
    """Its stacks of layers, lists of modules of one type: the longest, or several of that length. Raises DoesNotFit."""
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(layer) for layer in module}) == 1
    ]
    if not stacks:
        raise DoesNotFit(f"{type(model).__name__} has no stack of layers")
    longest = max(map(len, stacks))
    return [stack for stack in stacks if len(stack) == longest]


def leaves(tensors: Iterator[Tensor] | Sequence[Tensor]) -> set[Tensor]:
    """The leaves of autograd's graph that these depend on."""
    found, seen = set(), set()
    left: list[Any] = [x.grad_fn for x in tensors if x.grad_fn is not None]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        left += [following for following, _ in node.next_functions]
    return found


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def hidden_of(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states that a layer is called with."""
    return args[0] if args else kwargs[_name_of_hidden(kwargs)]


def with_hidden(args: tuple, kwargs: dict, hidden: Any) -> tuple[tuple, dict]:
    """A layer's arguments with others."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {_name_of_hidden(kwargs): hidden})


def _name_of_hidden(kwargs: dict) -> str:
    """As transformers call them, or whatever tensor comes first."""
    tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    if "hidden_states" not in tensors and not tensors:
        raise DoesNotFit("its layers are called without a tensor")
    return "hidden_states" if "hidden_states" in tensors else tensors[0]
