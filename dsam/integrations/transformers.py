"""Any method under the Hugging Face `Trainer`: accumulation, clipping, mixed precision, several processes, resume.

from dsam import DeltaSAM
from dsam.integrations.transformers import SharpnessAwareTrainer

trainer = SharpnessAwareTrainer(model, args, train_dataset=data, method=lambda model: DeltaSAM(model, rho=0.05))
trainer.train()
"""

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer

from ..methods import METHODS, ExampleLosses, Method, example_losses, unknown_method
from ..methods.buffers import kept, movable
from .distributed import Distributed

METHOD_STATE = "dsam_method{rank}.pt"
"""In a checkpoint's folder: the method's state and name; with several processes one file for each."""

METHOD_NAME, PROCESSES, OPTIONS = "method", "processes", "options"
"""The keys of its name, of how many processes there were, and of the options that are plain values."""

COMPARED = 8
"""On how many micro-batches that can tell them apart a model's own loss is compared with the one that is trained."""

LossFunction = Callable[[Any, Tensor], Tensor]
"""(the model's output, labels (B, …)) -> per-example losses (B,)."""


def classifier_losses(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy (B,) of a sequence classifier for integer labels (B,), squared error for float ones."""
    if labels.ndim != 1:
        raise ValueError(f"labels of shape {tuple(labels.shape)}: pass losses=, which returns one loss per example")
    return example_losses(outputs.logits, labels)


class SharpnessAwareMixin:
    """Put before `Trainer` (or a subclass that keeps its `training_step`) in the list of bases.

    A step is that of its whole batch: `gradient_accumulation_steps` micro-batches are collected, then the ascent runs
    over all of them and the descent over all, so the result equals that of the undivided batch, also where the last
    micro-batch is smaller. The model is called without its labels; so no loss scaling of the Trainer
    (`num_items_in_batch`, division by the accumulation steps) enters, and the logged loss is the mean over the
    batch's examples at w. The method's report (perturbation_norm, …) is logged beside it. Micro-batches that the end of
    an epoch leaves over (data of unknown length) go into the next step, as they do in `Trainer`. `total_flos` has one
    pass a step.

    Args:
        method: a name from `dsam.METHODS`, a Method class, or a function of the model that returns a Method.
        method_options: keywords for a name or a class; `seed` is `args.data_seed` or `args.seed` unless given.
        losses: (outputs, labels) -> per-example losses (B,), by default `classifier_losses`; evaluation has their mean.
        ascent: with several processes "global" or "local", see `dsam.integrations.distributed.Distributed`.

    `args.average_tokens_across_devices` is set to False: it would multiply the evaluation's loss by the number of
    processes, and training has no use for it.

    Checkpoints also hold the method's state, and `train(resume_from_checkpoint=…)` goes on bit for bit, with the same
    method and as many processes.

    Raises:
        ValueError: an unknown method or option, a checkpoint of another method or of another number of processes, or a
            setting that would not do what it says here: DataParallel (start one
            process per GPU with torchrun), FSDP, DeepSpeed, an overridden `compute_loss`, `compute_loss_func`, label
            smoothing without `losses`, a model whose own loss is another (class weights in its `forward`) without
            `losses`, an optimizer that steps inside the backward pass.
        NonFiniteGradient: out of `train`; the step was not taken. With fp16 the scaler skips the step instead.
    """

    def __init__(
        self,
        *args,
        method: str | type[Method] | Callable[[nn.Module], Method] = "delta_sam",
        method_options: Mapping[str, Any] | None = None,
        losses: LossFunction | None = None,
        ascent: str = "global",
        **kwargs,
    ):
        if isinstance(method, str):
            if method not in METHODS:
                raise ValueError(unknown_method(method))
            method = METHODS[method]
        if isinstance(method, Method):
            raise ValueError(
                f"method is a {type(method).__name__} that was made already: pass its class, or a function of the model"
            )
        if ascent not in ("global", "local"):
            raise ValueError(f"ascent must be 'global' or 'local', got {ascent!r}")
        if method_options and not isinstance(method, type):
            raise ValueError("method_options go with a method's name or class; a function takes care of its own")
        super().__init__(*args, **kwargs)
        self.args.average_tokens_across_devices = False
        if type(self).compute_loss is not Trainer.compute_loss:
            raise ValueError(
                f"{type(self).__name__}.compute_loss would not be called: pass losses=, one loss for each example"
            )
        if "layerwise" in self.args.optim or "lomo" in self.args.optim:
            raise ValueError(
                f"optim={self.args.optim} steps inside the backward pass, before the method has its gradient: take "
                "another optimizer"
            )
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func returns one number; pass losses=, which returns one loss per example")
        if self.args.label_smoothing_factor and losses is None:
            raise ValueError("label_smoothing_factor is not applied here: pass losses= with the smoothing in it")
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel over several GPUs is not supported: start one process per GPU with torchrun")
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(f"{self.accelerator.distributed_type.value} is not supported: it shards the weights")
        self._make_method, self._method_options = method, dict(method_options or {})
        self._example_losses, self._ascent = losses or classifier_losses, ascent
        self._compares, self._compared = losses is None, 0
        if losses is not None:  # what `evaluate` calls; training steps are `training_step`'s own
            self.compute_loss_func = lambda outputs, labels, **_: losses(outputs, labels).mean()
        self.method: Method | Distributed | None = None
        self._pending: list[_TrainerLosses] = []
        if self.model is not None and isinstance(method, type):
            self._check_options(method)

    def _made(self, model: nn.Module) -> Method:
        options = {}
        if isinstance(self._make_method, type):
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            options = {"seed": seed} | self._method_options
        return self._make_method(model, **options)

    def _check_options(self, method: type[Method]) -> None:
        """ValueError for an option that the method does not have: now, not when training begins."""
        try:
            with warnings.catch_warnings(action="ignore"):
                self._made(self.model)
        except TypeError as error:
            raise ValueError(f"method_options of {method.__name__}: {error}") from None
        except Exception:  # what does not go yet (all is frozen) may do when training begins
            pass

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.method = self._made(self.model)
        if self.accelerator.num_processes > 1:
            self.method = Distributed(self.method, model, ascent=self._ascent)
        self._pending, self._compared = [], 0
        if resume_from_checkpoint is not None:
            self._resume_method(resume_from_checkpoint)
        return model, train_dataloader

    def _resume_method(self, folder: str) -> None:
        there = {path.name for path in Path(folder).glob(METHOD_STATE.format(rank="*"))}
        if not there:  # the checkpoint of another trainer, or one of save_only_model
            warnings.warn(f"{folder} has no state of the method, which begins anew", stacklevel=2)
            return
        path = self._method_path(folder)
        saved = torch.load(path, map_location="cpu", weights_only=True) if Path(path).name in there else {}
        # With a disk of its own each node has the files of its own ranks alone.
        before = saved.pop(PROCESSES, len(there))
        if not saved or before != self.args.world_size:
            raise ValueError(
                f"{folder} has the method's state of another number of processes ({', '.join(sorted(there))}): resume "
                f"with as many, or remove {METHOD_STATE.format(rank='*')} there to begin its state anew"
            )
        name, own = saved.pop(METHOD_NAME, None), self._method_name()
        if name not in (None, own):  # None: an earlier version wrote it
            raise ValueError(
                f"{path} is the state of {name} and this training's method is {own}: resume with {name}, or remove "
                f"{METHOD_STATE.format(rank='*')} there to begin anew"
            )
        options, now = saved.pop(OPTIONS, None), self._plain_options()
        if options is not None and options != now:
            warnings.warn(f"{folder} was trained with method_options {options}, and goes on with {now}", stacklevel=2)
        self.method.load_state_dict(saved)

    def _plain_options(self) -> dict[str, Any]:
        kinds = (bool, int, float, str, type(None))
        return {name: value for name, value in self._method_options.items() if isinstance(value, kinds)}

    def _method_name(self) -> str:
        return type(self.method.method if isinstance(self.method, Distributed) else self.method).__name__

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Keeps the micro-batch; at the batch's last one takes the whole batch. Returns the batch's mean loss, or 0."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        self._pending.append(_TrainerLosses(self, model, self._prepare_inputs(inputs)))
        if self._compares and self._compared < COMPARED:
            self._compared += self._pending[-1].compare_with_own()
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        closures, self._pending = self._pending, []
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return self.method.backward(closures, scaler=self.accelerator.scaler)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.method is not None and "loss" in logs:
            passes = ("forwards", "backwards", "gradient_norm")
            logs = logs | {k: float(v) for k, v in self.method.report.items() if k not in passes}
        super().log(logs, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        of_it = {METHOD_NAME: self._method_name(), PROCESSES: self.args.world_size, OPTIONS: self._plain_options()}
        torch.save(self.method.state_dict() | of_it, self._method_path(output_dir))

    def _method_path(self, folder: str) -> str:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return os.path.join(folder, METHOD_STATE.format(rank=rank))


class SharpnessAwareTrainer(SharpnessAwareMixin, Trainer):
    """`Trainer` with a method; see `SharpnessAwareMixin`."""


class _TrainerLosses(ExampleLosses):
    """The closure of one micro-batch."""

    words = None
    """The Trainer and what it wraps the model in expect dense gradients."""

    def __init__(self, trainer: SharpnessAwareMixin, model: nn.Module, batch: Mapping[str, Any]):
        # Accelerate puts autocast into the model's forward: a caller's own autocast, or none, changes nothing there.
        native = trainer.accelerator.native_amp
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.trainer = trainer
        super().__init__(model, batch, types.get(trainer.accelerator.mixed_precision) if native else None)

    def __call__(self) -> Tensor:
        return self._losses_by(self.model(**self.inputs))

    def in_float32(self) -> Tensor:
        network = self.network
        with torch.autocast(self.labels.device.type, enabled=False):
            outputs = getattr(network, "_original_forward", network)(**self.inputs)
        return self._losses_by(outputs)

    def compare_with_own(self) -> bool:
        """ValueError where the model has a loss of its own, and it is not the mean of those that are trained. False
        where this batch cannot tell: class weights change little where the losses are much the same, as those of a
        head that starts at 0 are, and nothing where the labels are.

        As in training, where some models add terms; both are of the same outputs. Nothing is drawn or moved by it.
        """
        network = self.network
        takes = inspect.signature(getattr(network, "_original_forward", network.forward)).parameters
        if "labels" not in takes and not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
            return True
        random = self.trainer.method.random
        with torch.no_grad(), kept(movable(network)), random.replay(random.mark()):
            outputs = network(**self.inputs, labels=self.labels)
            own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
            if own is None or own.numel() != 1:
                return True
            losses = self.trainer._example_losses(outputs, self.labels)
        ours = losses.mean()
        rounding = 1e-3 if own.dtype == outputs.logits.dtype == torch.float32 else 2e-2
        tolerance = rounding * max(1e-3, abs(own), abs(ours))
        if not abs(own - ours) <= tolerance and own.isfinite():
            raise ValueError(
                f"{type(network).__name__}'s own loss is {float(own):.4f} on a batch where cross-entropy or squared "
                f"error, which would be trained, is {float(ours):.4f}: pass losses=, which returns one loss per example"
            )
        if len(losses) == 1:  # whose own loss a class's weight leaves as it is
            return True
        return bool(losses.max() - losses.min() > 10 * tolerance and (self.labels != self.labels[0]).any())

    def _losses_by(self, outputs: Any) -> Tensor:
        logits = getattr(outputs, "logits", None)
        self.logits = None if logits is None else logits.detach()
        return self.trainer._example_losses(outputs, self.labels)

    def _losses_of(self, output: Any, logits: Tensor) -> Tensor:
        output.logits = logits
        return self.trainer._example_losses(output, self.labels)

    @property
    def network(self) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def __len__(self) -> int:
        return len(self.labels)
