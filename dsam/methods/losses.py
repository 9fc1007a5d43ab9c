"""Per-example losses of a Hugging Face classifier: the closure that methods call."""

import copy
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import Note
from .compiled import is_compiled
from .gradients import wide

LOSS_OF_THEIR_OWN = ("ADALORA", "SHADOW")  # kinds of peft that add to the loss where a model sees labels
NOISE = "methods with noise on the embeddings (r3f, freelb, smart)"
NO_LABEL = torch.iinfo(torch.int64).min
"""Left out of losses: what is no label that anyone gives."""


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses (B,) in at least float32: cross-entropy for integer labels (B,), squared error for floats; logits (B, C).

    Raises ValueError for integer labels of a model with one output, which is a regression, for floats of one with
    several, for labels of another shape and for an empty batch.
    Labels that are no class are PyTorch's error, −100 too: a loss of 0 for it would count in the batch's mean.
    """
    if not len(labels):
        raise ValueError("the batch is empty: it has no losses")
    if labels.ndim != 1:
        raise ValueError(
            f"the labels have the shape {tuple(labels.shape)}, and losses need one for each example, (B,): pass "
            "labels.flatten(), or for several at once a closure that returns losses of its own"
        )
    if logits.shape[-1] == 1 and not labels.is_floating_point():
        raise ValueError(
            f"the model has one output, a regression, and the labels are {labels.dtype}: pass labels.float(), or make "
            "the model with num_labels=2 for two classes"
        )
    if logits.ndim > 1 and logits.shape[-1] > 1 and labels.is_floating_point():
        raise ValueError(
            f"the model has {logits.shape[-1]} outputs, classes, and the labels are {labels.dtype}: pass "
            "labels.long(), or make the model with num_labels=1 for a regression"
        )
    logits = wide(logits)
    if labels.is_floating_point():
        return (logits.reshape(len(labels)) - labels.to(logits.dtype)).square()
    return F.cross_entropy(logits, labels.long(), reduction="none", ignore_index=NO_LABEL)


class ExampleLosses:
    """Calling it runs `model` on `batch` and returns its per-example losses, shape (B,).

    Args:
        model: a Hugging Face sequence classifier (one output is a regression).
        batch: its inputs and `labels`.
        autocast: the precision of the forward pass, e.g. torch.bfloat16; None is that of the weights.

    Raises ValueError or TypeError for a batch without `labels`, or whose labels are no tensor.

    The losses are cross-entropy or squared error. The model never sees `labels`, so what its `forward` does with them
    (class weights, AdaLoRA's orthogonality) is no part of them.

    `logits` (B, C), detached, are those of the latest call. A subclass with a `__call__` of its own has these losses in
    parts of the batch and in float32 too; for the methods that take the outputs it needs an `outputs` of its own.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], autocast: torch.dtype | None = None):
        self.model = model
        self.inputs = {name: value for name, value in batch.items() if name != "labels"}
        if "labels" not in batch:
            raise ValueError(f"the batch has no 'labels', only {', '.join(map(str, batch))}")
        self.labels = batch["labels"]
        if not isinstance(self.labels, Tensor):
            raise TypeError(f"labels must be a tensor, got a {type(self.labels).__name__}: torch.tensor(labels)")
        self.autocast = autocast
        self.logits: Tensor | None = None
        self._require_decoder_inputs()
        if str(getattr(self.network, "peft_type", "")).rpartition(".")[2] in LOSS_OF_THEIR_OWN:
            warnings.warn(
                f"peft adds to the loss of {type(self.network).__name__} what is no part of ExampleLosses: add it in a "
                "subclass's __call__, as its mean over the examples",
                Note,
                stacklevel=2,
            )

    def __call__(self) -> Tensor:
        with torch.autocast(self.labels.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.model(**self.inputs).logits
        self.logits = logits.detach()
        return example_losses(logits, self.labels)

    def _require_decoder_inputs(self) -> None:
        """ValueError where the model would make its decoder's words out of labels, which it does not see. Without them
        BART takes the encoder's words for its decoder's."""
        network = self.network
        if self.labels.ndim < 2 or not hasattr(network, "prepare_decoder_input_ids_from_labels"):
            return
        if not {"decoder_input_ids", "decoder_inputs_embeds"}.intersection(self.inputs):
            raise ValueError(
                f"{type(network).__name__} is called without labels, from which it makes decoder_input_ids: add them "
                "to the batch, as DataCollatorForSeq2Seq(tokenizer, model=model) does"
            )

    def in_float32(self) -> Tensor:
        """The losses without autocast: differences of bfloat16 losses are mostly rounding."""
        other = copy.copy(self)
        other.autocast = None
        losses = other()
        self.logits = other.logits
        return losses

    def subset(self, indices: list[int]) -> Self:
        """The same closure for some of its examples, still padded as before. What of the inputs is no tensor with a row
        for each example stays as it is."""
        in_a_row = indices == list(range(indices[0], indices[0] + len(indices)))
        which = slice(indices[0], indices[0] + len(indices)) if in_a_row else indices  # a list travels to the device
        part, examples = copy.copy(self), len(self.labels)
        part.inputs = {
            name: value[which] if isinstance(value, Tensor) and value.shape[:1] == (examples,) else value
            for name, value in self.inputs.items()
        }
        part.labels = self.labels[which]
        return part

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def words(self) -> nn.Embedding | None:
        """The table of word embeddings where only the rows of `input_ids` matter and its gradient may be sparse: it is
        not tied to another layer, nor below wrappers that expect a dense gradient."""
        if "input_ids" not in self.inputs or not hasattr(self.model, "get_input_embeddings"):  # DistributedDataParallel
            return None
        if is_compiled(self.model):
            return None
        try:
            words = self._embeddings()
        except NotImplementedError:  # CANINE has no such table
            return None
        if type(words) is not nn.Embedding or words.scale_grad_by_freq:
            return None
        owners = [m for m in self.model.modules() if any(p is words.weight for p in m._parameters.values())]
        return words if len(owners) == 1 else None

    @property
    def word_ids(self) -> Tensor | None:
        """All that is looked up in `words`; None where a subclass has a `__call__` of its own: it may look up more."""
        return self.inputs.get("input_ids") if type(self).__call__ is ExampleLosses.__call__ else None

    def _embeddings(self) -> nn.Embedding:
        """The module that a Hugging Face model looks its words up with."""
        find: Any = getattr(self.network, "get_input_embeddings", None)
        if find is None or "input_ids" not in self.inputs:
            lacking = "get_input_embeddings()" if find is None else "input_ids"
            raise ValueError(f"{type(self.network).__name__} has no {lacking}: {NOISE} do not go with it")
        return find()

    @property
    def network(self) -> nn.Module:
        """The Hugging Face model itself."""
        model: Any = self.model
        return model.module if isinstance(model, DistributedDataParallel) else model

    @property
    def embedding_shape(self) -> tuple[int, int, int]:
        """(B, T, d) of what `model.get_input_embeddings()` puts out."""
        width = self._embeddings().weight.shape[1]
        return (*self.inputs["input_ids"].shape, width)

    @property
    def token_mask(self) -> Tensor:
        """(B, T, 1), float: 1 at tokens, 0 at padding."""
        ids = self.inputs["input_ids"]
        mask = self.inputs.get("attention_mask")
        return (torch.ones_like(ids) if mask is None else mask).float().unsqueeze(-1)

    def require_outputs(self) -> None:
        """ValueError where `outputs` would give other losses than the call."""
        own, base = type(self), ExampleLosses
        if own.__call__ is not base.__call__ and own.outputs is base.outputs and own._losses_of is base._losses_of:
            raise ValueError(
                f"{own.__name__} has losses of its own in __call__, and this method takes them from outputs(): give it "
                "one that returns them too, (losses, logits)"
            )

    def outputs(self, noise: Tensor | None = None, detached: bool = False) -> tuple[Tensor, Tensor]:
        """(losses (B,), logits (B, C) in at least float32 with their graph), with `noise` (B, T, d) on the embeddings,
        `detached`: on copies of these that no gradient goes through.

        Padding gets no noise. It goes in by hooks, during this call only, where the model looks `input_ids` up in the
        table of `get_input_embeddings()`; of an encoder and a decoder (T5, BART) where the encoder does, as we
        understand the code of R3F's authors.
        """
        added = None if noise is None else noise * self.token_mask
        called = False

        def add(_, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
            nonlocal called
            called = True
            assert added is not None
            turned = self._turned(args[0] if args else kwargs["input"])
            words, noise = out.detach() if detached else out, added.transpose(0, 1) if turned else added
            more = out.shape[1] - noise.shape[1]  # padding of the model's own, to its window (Longformer)
            return words + (nn.functional.pad(noise, (0, 0, 0, more)) if more else noise).to(out.dtype)

        with ExitStack() as hooks:
            for lookup in self._lookups() if noise is not None else []:
                hooks.enter_context(lookup.register_forward_hook(add, with_kwargs=True))
            with torch.autocast(self.labels.device.type, self.autocast, enabled=self.autocast is not None):
                output = self.model(**self.inputs)
        if noise is not None and not called:
            raise ValueError(
                f"{type(self.network).__name__} looks its words up elsewhere than in get_input_embeddings(): {NOISE} "
                "do not go with it"
            )
        logits = wide(output.logits)
        self.logits = logits.detach()
        return self._losses_of(output, logits), logits

    def _losses_of(self, output: Any, logits: Tensor) -> Tensor:
        """(B,) of what the model put out; `logits`: its own, in at least float32."""
        return example_losses(logits, self.labels)

    def _lookups(self) -> list[nn.Embedding]:
        """The modules that look the given words up: all with that table, of an encoder and a decoder the encoder's."""
        table, where = self._embeddings().weight, self.network
        if getattr(getattr(where, "config", None), "is_encoder_decoder", False):
            where = where.get_encoder()  # type: ignore[operator]  # a Hugging Face model's
        return [m for m in where.modules() if isinstance(m, nn.Embedding) and m.weight is table]

    def _turned(self, ids: Tensor) -> bool:
        """Whether a lookup has the sequence first, as XLNet's. ValueError where it is not of `input_ids`."""
        given = self.inputs["input_ids"]
        if given.shape[0] != given.shape[1]:
            if ids.shape in (given.shape, given.mT.shape):
                return ids.shape != given.shape
        elif torch.equal(ids, given):  # as many examples as tokens: only the values tell
            return False
        elif torch.equal(ids, given.mT):
            return True
        if ids.shape[:1] == given.shape[:1] and torch.equal(ids[:, : given.shape[1]], given):
            return False  # and more, behind them
        raise ValueError(
            f"{type(self.network).__name__} looks up other words than its input_ids: {NOISE} do not go with it"
        )
