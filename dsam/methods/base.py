"""What every method shares: a step's pieces, its passes, its random state, and the checks that stop it."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..errors import NonFiniteGradient
from .gradients import dense, sparse_gradient, whole
from .perturbation import RandomState, total_norm

Closure = Callable[[], Tensor]
"""Runs the model on one (micro-)batch and returns its per-example losses, shape (B,)."""


class Method:
    """What replaces `loss.backward()`: `method.backward(closure)` leaves the step's gradient in `.grad`.

    Afterwards the weights are bit for bit what they were, and buffers (batch-norm statistics) are what one clean
    pass leaves; the optimizer, scheduler, clipping and scaler stay plain PyTorch.

    Args:
        params: the parameters to perturb, or a module. With a module its buffers are protected too, and the
            methods that look inside the model (exact per-example norms) can.
        mask: "same" gives the descent the dropout masks of the ascent; "fresh" draws new ones. Either way ρ = 0
            draws the same masks as plain training.
        seed: of the method's own random draws (probes, fresh masks); it never touches PyTorch's default generator.

    After each `backward`, `report` holds what happened as floats or 0-dim tensors: forwards, backwards (each over
    the whole batch), gradient_norm, and whatever the method adds.
    """

    passes = 1.0
    """Forward-backward passes per step, in units of one training pass over the batch."""

    def __init__(self, params: nn.Module | Iterable[nn.Parameter], *, mask: str = "same", seed: int = 0):
        if mask not in ("same", "fresh"):
            raise ValueError(f"mask must be 'same' or 'fresh', got {mask!r}")
        self.module = params if isinstance(params, nn.Module) else None
        self.params = [p for p in (params.parameters() if self.module is not None else params) if p.requires_grad]
        if not self.params:
            raise ValueError("no parameter requires a gradient")
        self.mask = mask
        self.random = RandomState(self.params)
        self.generator = torch.Generator(self.params[0].device)
        self.generator.manual_seed(seed)
        self.report: dict[str, float | Tensor] = {}
        self.ranks = None  # dsam.integrations.distributed sets it where the ascent is that of all processes together

    def backward(self, closure: Closure | Sequence[Closure], scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Adds the step's gradient to `.grad`, dense, and returns the mean loss at w (0-dim, detached).

        Args:
            closure: returns the batch's losses, shape (B,); or a sequence of such closures, one for each
                micro-batch of one batch: the result is that of the undivided batch.
            scaler: scales the final gradient only. A non-finite one is then left in `.grad` for the scaler to skip.

        Raises:
            NonFiniteGradient: a loss or gradient is not finite. The weights are unchanged.
        """
        closures = [closure] if callable(closure) else list(closure)
        if not closures:
            raise ValueError("backward needs at least one closure")
        self.report = {"forwards": 0.0, "backwards": 0.0}
        self._states: list[list[Tensor] | None] = [None] * len(closures)
        self._sizes = [0] * len(closures)
        with self._buffers_kept():
            loss = self._backward(closures, scaler)
        if scaler is None:
            self.report["gradient_norm"] = norm = total_norm([p.grad for p in self.params])
            self._require_finite(norm, loss)
        return loss

    @staticmethod
    def _require_finite(norm: Tensor, loss: Tensor) -> None:
        if not torch.isfinite(norm) or not torch.isfinite(loss):
            raise NonFiniteGradient(f"gradient norm {float(norm)} at loss {float(loss)}: the step was not taken")

    def _backward(self, closures: list[Closure], scaler) -> Tensor:
        return self._descend(closures, scaler)

    # The two kinds of pass. Losses of several pieces come back as one tensor (B,), detached.

    def _forward(
        self, closures: list[Closure], k: int, *, ascent: bool = False, precise: bool = False, share: float = 1.0
    ) -> Tensor:
        """Losses of piece k, shape (B_k,); `precise`: in float32 where the closure can; `share` of a pass is run.

        The first forward of a step fixes the piece's masks, and later ones replay them. With mask="fresh" the ascent
        (and its probes) draw from a stream aside, and the descent from the main one.
        """
        self.report["forwards"] += share / len(closures)
        closure = getattr(closures[k], "in_float32", closures[k]) if precise else closures[k]
        if self._states[k] is not None and (ascent or self.mask == "same"):
            with self.random.replay(self._states[k]):
                losses = closure()
        elif ascent and self.mask == "fresh":
            seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
            with self.random.aside(seed):
                self._states[k] = self.random.get()
                losses = closure()
        else:
            self._states[k] = self.random.get()
            losses = closure()
        if losses.ndim != 1 or not losses.is_floating_point():
            raise ValueError(
                "the closure must return per-example losses of shape (B,), e.g. with reduction='none'; "
                f"got shape {tuple(losses.shape)}"
            )
        self._sizes[k] = len(losses)
        return losses

    def _gradient(
        self, closures: list[Closure], params: Sequence[nn.Parameter], *, by_rows: bool = False
    ) -> tuple[Tensor, list[Tensor | None]]:
        """(losses (B,), gradient of their mean with respect to `params`), leaving `.grad` alone.

        `by_rows`: that of the word embeddings may stay sparse, coalesced: `total_norm` and `perturbed` take it.
        """
        seen, total, size = [], None, _batch_size(closures)
        with self._summing(closures, by_rows):
            for k in range(len(closures)):
                losses = self._forward(closures, k, ascent=True)
                total = self._add_gradient(total, _share(losses, size, len(closures)), params, len(closures))
                seen.append(losses.detach())
        losses, total = torch.cat(seen), whole(total, by_rows)
        _check_size(size, losses)
        if size is None and len(closures) > 1:
            torch._foreach_div_([g for g in total if g is not None], len(losses))
        return losses, total

    def _add_gradient(self, total, loss: Tensor, params, pieces: int = 1) -> list[Tensor | None]:
        """`total` plus the gradient of the scalar `loss`; None marks parameters that no piece reached."""
        self.report["backwards"] += 1 / pieces
        gradient = torch.autograd.grad(loss, params, allow_unused=True)
        if total is None:
            return list(gradient)
        both = [(t, g) for t, g in zip(total, gradient, strict=True) if t is not None and g is not None]
        if both:
            torch._foreach_add_([t for t, _ in both], [g for _, g in both])
        return [g if t is None else t for t, g in zip(total, gradient, strict=True)]

    def _descend(self, closures: list[Closure], scaler, weights: Tensor | None = None, around=None) -> Tensor:
        """Adds the gradient of the mean (or `weights`-weighted sum) loss to `.grad`; returns the mean loss.

        `around(closures, k)`, if given, is a context in which piece k runs.
        """
        seen, start, size = [], 0, _batch_size(closures)
        divide = size is None and len(closures) > 1 and weights is None
        earlier = [p.grad for p in self.params] if divide else None
        if earlier is not None:
            for p in self.params:
                p.grad = None
        with self._summing(closures):
            for k in range(len(closures)):
                with around(closures, k) if around is not None else nullcontext():
                    losses = self._forward(closures, k)
                    seen.append(losses.detach())
                    if weights is not None:
                        loss = (losses * weights[start : start + len(losses)]).sum()
                    else:
                        loss = _share(losses, size, len(closures))
                    start += len(losses)
                    (scaler.scale(loss) if scaler is not None else loss).backward()
                self.report["backwards"] += 1 / len(closures)
        for p in self.params:
            p.grad = dense(p.grad)
        losses = torch.cat(seen)
        _check_size(size, losses)
        if earlier is not None:
            torch._foreach_div_([p.grad for p in self.params if p.grad is not None], len(losses))
            for p, grad in zip(self.params, earlier, strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else p.grad.add_(grad)
        return losses.mean()

    @staticmethod
    def _summing(closures: list[Closure], by_rows: bool = False):
        """Around the passes over a batch's pieces, whose gradients `dense` or `whole` then makes whole."""
        return sparse_gradient(getattr(closures[0], "words", None) if by_rows or len(closures) > 1 else None)

    @contextmanager
    def _buffers_kept(self):
        """Lets the first pass over the batch move the buffers, and undoes what further passes do to them."""
        self._clean_buffers = None
        yield
        if self._clean_buffers is not None:
            for buffer, clean in self._clean_buffers:
                buffer.copy_(clean)

    def _clean_pass_done(self) -> None:
        if self._clean_buffers is None and self.module is not None and self.module.training:
            self._clean_buffers = [(b, b.clone()) for b in self.module.buffers()]

    def state_dict(self) -> dict:
        """What a resumed run needs so that the method goes on exactly as it would have."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])


def _batch_size(closures: Sequence[Closure]) -> int | None:
    """The batch's size, if the closures say it before they run; else gradients are divided after the last piece."""
    return sum(map(len, closures)) if all(hasattr(closure, "__len__") for closure in closures) else None


def _share(losses: Tensor, size: int | None, pieces: int) -> Tensor:
    """What a piece adds to the batch's mean loss; its sum where the batch's size is not known yet."""
    return losses.mean() if pieces == 1 else losses.sum() if size is None else losses.sum() / size


def _check_size(size: int | None, losses: Tensor) -> None:
    if size not in (None, len(losses)):
        raise ValueError(f"the closures' len() adds up to {size} examples, but they returned {len(losses)} losses")


class Plain(Method):
    """The gradient of the mean loss: what `loss.mean().backward()` gives."""
