"""Examples per second of plain fine-tuning, beside Hugging Face's Trainer on the same batches, in turn."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..config import Config
from ..errors import UserError
from ..runs.run import Ready, prepare
from ..training.batches import epoch_order
from ..training.model import build
from .padding import require_pieces
from .steps import Steps

CONTENDERS = (
    "dsam",
    "dsam, padding-free",
    "dsam, bfloat16",
    "Trainer, dynamic padding",
    "Trainer, padded to the limit",
)
"""`Trainer, padded to the limit` is what its GLUE example does by default (pad_to_max_length)."""


@dataclass
class Throughput:
    """One contender's figures in one setting."""

    name: str
    examples_per_second: float  # the median over rounds
    padded_tokens: int  # that went through the model for these batches, padding included


def measure(config: Config, steps: int, rounds: int) -> list[Throughput]:
    """Times every contender in one alternating run of `steps` optimizer steps a round, after some that do not count
    (`Steps.unsteady`). UserError for a setting that is one of the contenders, or a GPU that `Trainer` does not take.

    All see the same examples in the same batches in the same order. What is timed is all that a step takes: making
    the batch, forward, backward, clipping, AdamW. What runs with padding after all is left out, and says why.
    """
    require_pieces(config, "throughput")
    ready = prepare(config)
    if ready.device.index:
        raise UserError(
            f"device.name={config.device.name}: Trainer takes the first GPU that it sees: take device.name=cuda, with "
            f"CUDA_VISIBLE_DEVICES={ready.device.index} before the command"
        )
    examples, batch = ready.data[ready.task.train[0]], config.train.batch_size
    order = epoch_order(len(examples), config.seeds.data, 0)[: steps * batch]
    lengths = examples.lengths[order]
    limit = config.train.max_length
    half, free = (
        config.model_copy(update={"train": config.train.model_copy(update=change)})
        for change in ({"precision": "bfloat16"}, {"padding": "free"})
    )
    ours, ours_half, ours_free = Steps(config, ready), Steps(half, prepare(half)), Steps(free, prepare(free))
    left_out = {"dsam, padding-free"} if ours_free.backward.packing is None else set()
    left_out |= {"dsam, bfloat16"} if config.train.precision == "bfloat16" else set()  # which is `dsam` then
    names = [name for name in CONTENDERS if name not in left_out]
    tokens = {
        "dsam": ours.tokens(order),
        "dsam, padding-free": ours_free.tokens(order),
        "dsam, bfloat16": ours_half.tokens(order),
        "Trainer, dynamic padding": sum(
            len(lengths[k : k + batch]) * int(lengths[k : k + batch].max()) for k in range(0, len(order), batch)
        ),
        "Trainer, padded to the limit": len(order) * limit,
    }
    theirs = build(config, ready.task.num_labels, ready.tokenizer).to(ready.device)  # with transformers' attention
    contenders: dict[str, Callable[[], float]] = {
        "dsam": lambda: ours(order),
        "dsam, padding-free": lambda: ours_free(order),
        "dsam, bfloat16": lambda: ours_half(order),
        "Trainer, dynamic padding": lambda: trainer(theirs, ready, order, config, None),
        "Trainer, padded to the limit": lambda: trainer(theirs, ready, order, config, limit),
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(1 - ours.unsteady, rounds + 1):
        print(f"{config.task.name}: throughput, round {max(turn, 0)}/{rounds}", file=sys.stderr, flush=True)
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            spent = contenders[name]()
            if turn > 0:
                seconds[name].append(spent)
    return [Throughput(name, len(order) / statistics.median(seconds[name]), tokens[name]) for name in names]


def trainer(model: PreTrainedModel, ready: Ready, order: np.ndarray, config: Config, width: int | None) -> float:
    """Seconds for the same in `Trainer`, from its first step's beginning to its last one's end."""
    examples = ready.data[ready.task.train[0]]
    names = [name for name in ("input_ids", "token_type_ids") if getattr(examples, name) is not None]
    rows = [
        {name: getattr(examples, name)[examples.offsets[i] : examples.offsets[i + 1]].tolist() for name in names}
        | {"labels": examples.labels[i].item()}
        for i in order
    ]
    padding = {"padding": True} if width is None else {"padding": "max_length", "max_length": width}
    clock = _Clock()
    given = TrainingArguments(
        output_dir=config.paths.cache,
        per_device_train_batch_size=config.train.batch_size,
        num_train_epochs=1,
        learning_rate=1e-6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=ready.device.type == "cpu",
        bf16=config.train.precision == "bfloat16",
        logging_strategy="no",
    )
    given._n_gpu = min(given.n_gpu, 1)  # on several the Trainer would take larger batches, and fewer steps
    run = _InOrder(
        model.train(),
        given,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(ready.tokenizer, **padding),
        callbacks=[clock],
    )
    run.remove_callback(PrinterCallback)
    run.train()
    return clock.seconds


class _InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


class _Clock(TrainerCallback):
    seconds = 0.0

    def on_train_begin(self, *args, **options):
        self.seconds = time.perf_counter()

    def on_train_end(self, *args, **options):
        self.seconds = time.perf_counter() - self.seconds
