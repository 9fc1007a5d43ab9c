"""One batch on its way through a method: its pieces, their masks, and the passes over them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import NonFiniteGradient
from . import buffers
from .gradients import add, outside_autocast, owned, sparse_gradient, whole
from .perturbation import Gradients, Mark, perturbed, total_norm
from .piece import Closure, pieces_of, require_losses

if TYPE_CHECKING:
    from .base import Method
    from .weighting import Probe, Weighting

REENTRANT = (
    "gradient checkpointing must be the kind with use_reentrant=False: the other one hides the parameters of its "
    "layers, which would stay as they are"
)
MISTAKES = {
    "use_reentrant": REENTRANT,
    "does not require grad and does not have a grad_fn": (
        "the closure's losses have no graph: they were made under torch.no_grad() or inference_mode(), or of a model "
        "that is not the method's"
    ),
    "backward through the graph a second time": (
        "the closure gave a graph that an earlier pass has used: it must run the model itself each time that it is "
        "called, and take no losses or features from outside"
    ),
}
"""What PyTorch says where a closure is none -> what is wrong."""
HALF = "probes under the caller's autocast"  # what `Method.checked` then has
Around = Callable[[int], AbstractContextManager]


@contextmanager
def mistakes_named() -> Iterator[None]:
    """ValueError with what is wrong, in place of what PyTorch says of a closure that is none."""
    try:
        yield
    except RuntimeError as error:
        for words, said in MISTAKES.items():
            if words in str(error):
                raise ValueError(said) from None
        raise


class Overflowed(Exception):
    """A gradient that the scaler is to find, so that it skips the step and lowers its scale."""

    def __init__(self, losses: Tensor, gradient: Gradients):
        super().__init__("a gradient overflowed under the scaler")
        self.losses, self.gradient = losses, gradient


class Step:
    """The batch of one `Method.backward`, which may come in several pieces: results are those of the undivided batch.

    Methods ask it for gradients (lists with one tensor per parameter, None where no piece reached it) and never touch
    `.grad`, dropout's masks, buffers, scalers or the batch's division themselves.

    `report` counts forwards and backwards, each over the whole batch, and takes what the method adds.
    """

    def __init__(
        self,
        method: "Method",
        closures: Closure | Sequence[Closure],
        scaler: torch.amp.GradScaler | None = None,
        wait: bool = True,
    ):
        self.pieces = pieces_of(closures)
        self.params, self.module = method.params, method.module
        self.mask, self.random, self.host_generator = method.mask, method.random, method.host_generator
        # One that is not enabled neither scales nor skips: it is none.
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.checked, self.wait = method.checked, wait or self.scaler is not None
        self.looked: set[str] = set()  # what was checked in this step
        self.note = method.note
        self.finite: Tensor | None = None  # whether all was, of what nobody waited for
        self.report: dict[str, float | Tensor] = {"forwards": 0.0, "backwards": 0.0}
        self.costs = [1 / len(self.pieces)] * len(self.pieces)  # of a forward pass of each piece, in the whole batch's
        self._masks: list[Mark | None] = [None] * len(self.pieces)
        self._run = [False] * len(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    # Passes over one piece.

    def losses(self, k: int, *, ascent: bool = False, precise: bool = False, share: float = 1.0) -> Tensor:
        """Losses of piece k, shape (B_k,).

        Args:
            ascent: it serves to find the perturbation: with mask="fresh" its masks come from a stream aside.
            precise: in float32 where the closure can.
            share: how much of the model is run, for the count.
        """

        def run() -> Tensor:
            with self.passing(k, share), self._masks_of(k, ascent), self._precision(precise):
                return self.pieces[k].losses(precise)

        if not precise or not self._within_autocast:
            return run()
        before = self.report["forwards"]
        try:
            return run()
        except RuntimeError as error:
            if not any(words in str(error) for words in ("dtype", "scalar type", "Input type")):
                raise
        self.report["forwards"] = before
        self.checked.add(HALF)
        self.note("probes run under the autocast around the step, since the closure does not go without it")
        return run()

    def aside(self, k: int, precise: bool = True) -> Tensor:
        """Losses of piece k as a pass that is no part of the step: not counted, and nothing drawn or moved by it."""
        state = self._masks[k]
        if state is None:
            state = self.random.mark()
        with self._gradient_left_alone(), buffers.kept(self._movable), self.random.replay(state):
            return self.pieces[k].losses(precise)

    @property
    def autocast(self) -> bool:
        """Whether losses come from autocast that precise ones go without: a closure's own, or that around the step."""
        return self._within_autocast or any(piece.autocast for piece in self.pieces)

    @property
    def _within_autocast(self) -> bool:
        device = self.params[0].device.type
        known = HALF not in self.checked and torch.amp.is_autocast_available(device)
        return known and torch.is_autocast_enabled(device)

    def _precision(self, precise: bool) -> AbstractContextManager:
        off = precise and self._within_autocast
        return torch.autocast(self.params[0].device.type, enabled=False) if off else nullcontext()

    def all_losses(self, *, ascent: bool = False) -> list[Tensor]:
        """Losses of all pieces without their graphs."""
        with torch.no_grad():
            return [self.losses(k, ascent=ascent) for k in range(len(self))]

    @contextmanager
    def passing(self, k: int, share: float = 1.0) -> Iterator[None]:
        """Around one forward pass of piece k: counts it, and undoes what any but the piece's first does to buffers."""
        self.report["forwards"] += share * self.costs[k]
        again, self._run[k] = self._run[k], True
        with self._gradient_left_alone(), buffers.kept(self._movable) if again else nullcontext():
            yield

    @contextmanager
    def _gradient_left_alone(self) -> Iterator[None]:
        grads = [(p.grad, 0 if p.grad is None else p.grad._version) for p in self.params]
        yield
        for p, (grad, version) in zip(self.params, grads, strict=True):
            if p.grad is not grad or (grad is not None and grad._version != version):
                raise ValueError(
                    "the closure changed .grad: it must only compute and return the losses, without backward() or "
                    "zero_grad(), as in method.backward(lambda: losses(model(x), y)); optimizer.step(); "
                    "optimizer.zero_grad()"
                )

    @cached_property
    def _movable(self) -> list[nn.Module]:
        """Of the method's module and of what the closures say that they run, which may be more."""
        roots = dict.fromkeys(
            root for root in (self.module, *(piece.model for piece in self.pieces)) if root is not None
        )
        return list(dict.fromkeys(module for root in roots for module in buffers.movable(root)))

    def reruns_undone(self) -> AbstractContextManager:
        """Around every backward pass: see `buffers.reruns_undone`."""
        return buffers.reruns_undone(self._movable)

    @contextmanager
    def _masks_of(self, k: int, ascent: bool) -> Iterator[None]:
        """The first forward of a step fixes the piece's masks, and later ones replay them. With mask="fresh" the ascent
        (and its probes) draw from a stream aside, and the descent from the main one."""
        known = self._masks[k]
        if known is not None and (ascent or self.mask == "same"):
            with self.random.replay(known):
                yield
        elif ascent and self.mask == "fresh":
            with self.other_masks():
                self._masks[k] = self.random.mark()
                yield
        else:
            self._masks[k] = self.random.mark()
            yield

    def other_masks(self) -> AbstractContextManager:
        """Inside, masks come from a stream aside, begun anew."""
        seed = int(torch.randint(2**62, (), generator=self.host_generator))
        return self.random.aside(seed)

    def outputs(
        self, k: int, noise: Tensor | None = None, other_masks: bool = False, detached: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(losses (B_k,), logits (B_k, C)) of piece k, with `noise` on its embeddings, `detached` from their table or
        not; the first call draws the masks."""
        closure = self.pieces[k].outputs
        assert closure is not None
        other = other_masks or (self.mask == "fresh" and self._masks[k] is not None)
        with self.passing(k), self.other_masks() if other else self._masks_of(k, ascent=False):
            losses, logits = closure.outputs(noise, detached=True) if detached else closure.outputs(noise)
            return require_losses(losses), logits

    def forget_masks(self) -> None:
        """The next pass draws its masks anew."""
        self._masks = [None] * len(self)

    # Gradients of all pieces.

    def gradient(
        self,
        *,
        ascent: bool = False,
        weights: Tensor | None = None,
        only: Sequence[bool] | None = None,
        by_rows: bool = False,
        around: Around | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """(losses (B,), gradient of their mean), the gradient dense.

        Args:
            ascent: see `losses`.
            weights: (B,): of the weighted sum in place of the mean.
            only: for which parameters; the others' gradient is None.
            by_rows: that of the word embeddings may stay sparse, coalesced: `total_norm` and `at` take it.
            around: around(k) is a context in which piece k runs.
        """
        seen: list[Tensor] = []
        total: list[Tensor | None] | None = None
        size, start = self.size, 0
        with self.summing(by_rows):
            for k in range(len(self)):
                with around(k) if around is not None else nullcontext():
                    losses = self.losses(k, ascent=ascent)
                    seen.append(losses.detach())
                    if weights is not None:
                        loss = (losses * weights[start : start + len(losses)]).sum()
                    elif len(self) == 1:
                        loss = losses.mean()
                    else:
                        loss = losses.sum() if size is None else losses.sum() / size
                    start += len(losses)
                    total, _ = self.differentiate(total, loss, self.costs[k], only=only)
        if total is None:  # of several processes' examples none fell to this one
            found, total = torch.zeros(0, device=self.params[0].device), [None] * len(self.params)
        else:
            found = torch.cat(seen)
        if size not in (None, len(found)):
            raise ValueError(f"the closures' len() adds up to {size} examples, but they returned {len(found)} losses")
        gradient = self.whole(total, by_rows)
        present = [g for g in gradient if g is not None]
        if size is None and len(self) > 1 and weights is None and present:
            torch._foreach_div_(present, len(found))
        gradient = self.joint(found, gradient, weighted=weights is not None)
        if only is None:
            require_reached(gradient, self.params)
        return found, gradient

    def differentiate(
        self,
        total: list[Tensor | None] | None,
        loss: Tensor,
        passes: float,
        *,
        also: Sequence[Tensor] = (),
        only: Sequence[bool] | None = None,
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """(`total` plus the gradient of the scalar `loss`, its gradients in `also`); counts so many backward passes."""
        self.report["backwards"] += passes
        chosen = [p for p, wanted in zip(self.params, only, strict=True) if wanted] if only is not None else self.params
        scale = None
        if self.scaler is not None:  # an ascent's gradients underflow as a descent's do
            loss = self.scaler.scale(loss)
            scale = self.scaler.get_scale()
        with self.reruns_undone(), outside_autocast(loss.device):
            found = self.grad(loss, [*chosen, *also])
        if "graph" not in self.checked and any(g is None for g in found):
            require_no_reentrant_checkpoint(loss)
            self.checked.add("graph")
        gradient, further = owned(found[: len(chosen)]), [g for g in found[len(chosen) :] if g is not None]
        present = [g for g in (*gradient, *further) if g is not None]
        if scale is not None and present:  # exact, a power of two; the step's end scales again
            torch._foreach_div_(present, scale)
        if only is not None:
            given = iter(gradient)
            gradient = [next(given) if wanted else None for wanted in only]
        return add(total, gradient), further

    def grad(self, loss: Tensor, of: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradients of the scalar `loss` in these leaves."""
        return torch.autograd.grad(loss, of, allow_unused=True)

    def scale_of_one(self, examples: int) -> float:
        """What to multiply single losses by, a power of two: the scaler's, for a mean over so many; 1 without one."""
        return 1.0 if self.scaler is None else self.scaler.get_scale() / 2 ** (examples - 1).bit_length()

    @property
    def size(self) -> int | None:
        """The batch's size, if all closures say theirs before they run."""
        sizes = [piece.size for piece in self.pieces]
        return None if None in sizes else sum(s for s in sizes if s is not None)

    @cached_property
    def words(self) -> nn.Embedding | None:
        """The table of word embeddings of which only the rows of the batch matter. None off the CPU: elsewhere to
        clear a whole table costs less than to wait for which rows there are."""
        if not self.pieces or self.params[0].device.type != "cpu":
            return None
        words = self.pieces[0].words
        return words if all(piece.words is words for piece in self.pieces[1:]) else None

    def rows_suffice(self) -> bool:
        return self.params[0].device.type == "cpu"

    def summing(self, by_rows: bool = False) -> AbstractContextManager:
        """Around passes over the pieces whose gradients `whole` then makes whole."""
        return sparse_gradient(self.words if (by_rows and self.rows_suffice()) or len(self) > 1 else None)

    def whole(self, total: Gradients, by_rows: bool = False) -> list[Tensor | None]:
        return whole(total, by_rows and self.rows_suffice())

    # What several processes do together (`dsam.integrations.distributed`); one process is alone.

    alone = True
    """Whether its passes are over this process's examples only."""

    def alike(self, value: float) -> bool:
        """Whether it is the same number on all processes."""
        return True

    def joint(self, losses: Tensor, gradient: Gradients, weighted: bool = False) -> list[Tensor | None]:
        """The gradient over the batches of all processes, from this one's over its `losses` (B,)."""
        return list(gradient)

    def mean(self, losses: Tensor) -> Tensor:
        """The mean loss over the batches of all processes."""
        return losses.mean()

    def weigh(self, weighting: "Weighting", losses: Tensor, probe: "Probe") -> Tensor:
        """This process's part (B,) of the weights of all processes' examples; reports how even they are."""
        weights = weighting(losses, probe)
        self.report_weights(weights)
        return weights

    def report_weights(self, weights: Tensor) -> None:
        self.report["effective_sample_size"] = 1 / weights.square().sum()
        self.report["largest_weight"] = weights.max()

    def largest(self, values: Tensor, share: float, less: int = 0) -> Tensor:
        """Which of `values` (B,) are among the largest `share` of all processes' examples, and so many `less`, at least
        one: (B,), bool."""
        chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        chosen[values.topk(count_of(share, len(values), less)).indices] = True
        return chosen

    # Moving, and the step's end.

    def at(
        self, direction: Gradients, scale: Tensor | float, params: Sequence[nn.Parameter] | None = None
    ) -> AbstractContextManager:
        """Inside, the weights (or only these `params`) are at w + scale · direction."""
        return perturbed(self.params if params is None else params, direction, scale)

    def placed(self, whole: Tensor, like: nn.Parameter) -> Tensor:
        """A direction in the parameter, where its numbers lie."""
        return whole

    def require_finite(self, norm: Tensor, losses: Tensor, gradient: Gradients) -> None:
        """Ends the step where the ascent's norm or a loss is not finite: NonFiniteGradient, or the scaler skips it.
        A step that does not wait goes on, and remembers it."""
        loss = self.mean(losses)
        if self.scaler is not None:
            if not torch.isfinite(norm):
                raise Overflowed(losses, self.whole(gradient))
        else:
            self._require_finite(norm, loss)

    def _require_finite(self, norm: Tensor, loss: Tensor) -> None:
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        if not self.wait:
            self.finite = finite if self.finite is None else self.finite & finite
        elif not finite:
            raise not_finite(norm, loss)

    def is_finite(self, norm: Tensor) -> bool:
        """Whether a method may learn from a gradient of this norm. A step that does not wait says yes: where it was
        not, the training ends."""
        return not self.wait or bool(torch.isfinite(norm))

    def restricted(self, parts: Sequence[tuple[int, list[int]]], sizes: Sequence[int]) -> "Step":
        """The step of some examples of this batch alone, under the same report, masks and buffers.

        Args:
            parts: (piece, indices of its examples) of each.
            sizes: of this step's pieces.
        """
        part = object.__new__(type(self))
        _ = self._movable  # looked up once for all parts
        vars(part).update(vars(self))
        pieces = [self.pieces[k] for k, _ in parts]
        part.pieces = [piece.restricted(indices) for piece, (_, indices) in zip(pieces, parts, strict=True)]
        run = [len(indices) if self.pieces[k].restrictable else sizes[k] for k, indices in parts]
        part.costs = [examples / sum(sizes) for examples in run]
        part._masks = [self._masks[k] for k, _ in parts]
        part._run = [self._run[k] for k, _ in parts]
        return part

    def sizes(self) -> list[int]:
        """Examples of each piece. One that cannot be restricted is run to count them, which fixes its masks."""
        return [
            size if piece.restrictable and (size := piece.size) is not None else self._counted(k)
            for k, piece in enumerate(self.pieces)
        ]

    @torch.no_grad()
    def _counted(self, k: int) -> int:
        return len(self.losses(k, ascent=True))

    def finish(self, losses: Tensor, gradient: Gradients) -> Tensor:
        """Adds `gradient` to `.grad`, scaled by the scaler, and returns the mean loss at w."""
        loss = self.mean(losses)
        if self.scaler is not None:
            self.scaler.scale(loss)  # so that a scaler that has seen no loss in this step is ready
            torch._foreach_mul_([g for g in gradient if g is not None], self.scaler.get_scale())
        else:
            norm = total_norm(gradient)
            self._require_finite(norm, loss)
            if self.finite is not None:
                self.report["finite"] = self.finite
            self.report["gradient_norm"] = norm
        earlier = False
        for p, g in zip(self.params, gradient, strict=True):
            if g is not None:
                earlier = earlier or p.grad is not None
                p.grad = g if p.grad is None else g.add_(p.grad) if p.grad.is_sparse else p.grad.add_(g)
        if earlier and self.scaler is None:
            self.report["gradient_norm"] = total_norm([p.grad for p in self.params])
        return loss


def require_reached(gradient: Gradients, params: Sequence[Tensor]) -> None:
    if all(g is None for g in gradient):
        if any(hasattr(p, "full_tensor") for p in params):
            raise ValueError(
                "the parameters are shards (fully_shard), which a loss does not reach by itself: take "
                "dsam.integrations.distributed.Distributed(method, model)"
            )
        raise ValueError(
            "the loss depends on none of the method's parameters: was the method made of another model, or of a copy?"
        )


def require_no_reentrant_checkpoint(loss: Tensor) -> None:
    """ValueError where layers are checkpointed in a way that hides their parameters from autograd.grad."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(REENTRANT)
        left += [following for following, _ in node.next_functions]


def count_of(share: float, examples: int, less: int = 0) -> int:
    """⌊share · examples⌋ − less, at least one."""
    return max(1, int(share * examples + 1e-9) - less)


def not_finite(norm: Tensor | float, loss: Tensor | float) -> NonFiniteGradient:
    return NonFiniteGradient(f"gradient norm {float(norm)} at loss {float(loss)}: the step was not taken")
