"""One run from its configuration to its result."""

import hashlib
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .. import glue
from ..config import Config, Tracking
from ..errors import UserError
from ..methods import METHODS, Method
from ..task import Task
from ..text import counted
from ..training import model as models
from ..training.batches import held_out
from ..training.checkpoint import Checkpoints
from ..training.device import choose_device, memory_in_use, memory_said, prepare_for_gpu
from ..training.device import notes as notes_of_device
from ..training.dropout import use_fast_dropout
from ..training.loop import State, best, fine_tune
from ..training.padding_free import PaddingFree, padding_free
from . import lease
from .identity import RECORD_VERSION, Identity, hyperparameters, identify
from .kept import kept_weights, lacks_weights
from .kept import phases as phases_of
from .provenance import going_on, provenance
from .record import Record
from .tracking import Tracker

CUT = 0.01
"""Share of a split's texts above which it is said that they are cut."""


def run(config: Config) -> dict:
    """Trains what `config` says and returns its result; a finished run is returned at once, a broken one goes on. One
    that is finished and kept no weights, which `config` now wants, is trained again for them: its result stays.

    A run that starts from another (`initialise_from`) has that one done first.

    Raises:
        UserError: the data, the model or the run folder cannot be used; Busy, if another process is at the run.
        Stopped: asked to stop; the same call goes on from the checkpoint.
    """
    identity = identify(config)
    record = Record(identity.folder)
    result = record.result()
    if result is not None:
        if not lease.alive(lease.path_in(record.folder)):  # killed after its result and before it had cleared up
            with suppress(OSError):  # nor need it be, where nothing can be removed
                Checkpoints(record.folder / "checkpoint").clear()
                lease.path_in(record.folder).unlink(missing_ok=True)
        if lacks_weights(config, record.folder, result):
            with record.worked_on():
                if lacks_weights(config, record.folder, result):  # still, now that no other process is at it
                    _keep_afterwards(config, record, result)
        return result
    ready = prepare(config)
    take_up_parent(config, ready)
    with record.worked_on(), memory_said(ready.device):
        result = record.result() or _train(config, identity, record, ready)
        if lacks_weights(config, record.folder, result):  # it went on from after where they would have been kept
            _keep_afterwards(config, record, result)
        return result


def take_up_parent(config: Config, ready: "Ready") -> None:
    """Gives the network the encoder of the run that it starts from (`initialise_from`), if any, which is done first."""
    if config.parent:
        parent = Config.resolved(config.parent)
        found = run(parent)
        models.start_from(ready.network, kept_weights(parent))
        lacks = []  # it has these settings too, and may not have been thought of
        if noise := parent.data.label_noise:
            lacks.append(f"{100 * noise:g} % of its labels wrong")
        if examples := parent.train.max_train_examples:
            lacks.append(f"{examples:,} training examples")
        if steps := parent.train.max_steps:
            lacks.append(f"at most {steps:,} steps")
        if lacks:
            ready.otherwise.append(f"the run that it starts from ({parent.task.name}) has {', '.join(lacks)} as well")
        if found["status"] == "diverged":
            ready.otherwise.append(
                f"the run that it starts from diverged ({found['diverged']}): its weights of epoch "
                f"{found['best']['epoch']:g}, the best before that, were taken"
            )


def _keep_afterwards(config: Config, record: Record, result: dict) -> None:
    """Trains a finished run again, beside itself, and takes over its weights. UserError where they are others."""
    names = ", ".join(f"{name}/" for name in lacks_weights(config, record.folder, result))
    print(f"{record.folder} has no {names}: it is trained again for them")
    beside = record.folder / "again"
    paths, tracking = config.paths.model_copy(update={"runs": str(beside)}), Tracking(mode="disabled")
    other = config.model_copy(update={"paths": paths, "tracking": tracking})
    if run(other)["weights_sha256"] != result["weights_sha256"]:
        raise UserError(
            f"{record.folder}: trained again it has other weights, as may be on a GPU or another machine: they are "
            f"kept in {beside}, and the run stays as it was"
        )
    kept = [folder for folder in identify(other).folder.iterdir() if (folder / "config.json").is_file()]
    for folder in sorted(kept, key=lambda folder: folder.name == "best"):  # which says that all are there
        if not (record.folder / folder.name).exists():
            folder.rename(record.folder / folder.name)
    shutil.rmtree(beside)


def _train(config: Config, identity: Identity, record: Record, ready: "Ready") -> dict:
    task, network, data, device = ready.task, ready.network, ready.data, ready.device
    method = make_method(config, network)
    packing, padded = packing_of(config, ready, method)
    otherwise = [*ready.otherwise, *padded]
    notes = [*ready.notes, *otherwise]
    for note in notes:
        print(note)

    checkpoints = Checkpoints(record.folder / "checkpoint", record.require_held)
    made_with = provenance(device, identity.contents) | {"notes": notes}
    if (before := record.provenance()) and checkpoints.found(device.type):
        made_with, other = going_on(made_with, before)
        if other:
            otherwise.append(f"went on from a checkpoint that was made with another {', '.join(other)}")
            print(otherwise[-1])
    record.open(config.to_dict(), made_with)
    with Tracker(config, identity.id, record.folder, identity.contents) as tracker:

        def log(line: dict) -> None:
            record.log(line)
            tracker.log(line)

        def keep(name: str, wanted: bool = config.checkpoint.keep_weights) -> None:
            if wanted:
                models.save(network, ready.tokenizer, record.folder / name)
            else:  # an earlier attempt may have kept those of another epoch
                shutil.rmtree(record.folder / name, ignore_errors=True)

        def resume(saved: dict) -> None:
            lost = [line for line in record.cut_log(saved["step"]) if line.get("event") == "evaluation"]
            scored = [line for line in lost if line["score"] is not None and line.get("heldout_score", 0) is not None]
            if best([*saved["evaluations"], *scored]) in scored:  # on a GPU it may not come out the same again
                shutil.rmtree(record.folder / "best", ignore_errors=True)

        phases: dict[int, list[Callable[[], None]]] = {}
        for name, step in phases_of(config, trained_examples(config, data[task.train[0]])).items():
            phases.setdefault(step, []).append(partial(keep, name, True))

        state = fine_tune(
            config,
            task,
            data,
            network,
            method,
            device,
            checkpoints,
            log=log,
            resume=resume,
            on_best=partial(keep, "best"),
            phases=phases,
            whole=ready.whole,
            packing=packing,
        )
        keep("last")
        result = summarise(config, identity.id, task, data, state, network, device)
        if otherwise or method.notes:
            result["notes"] = [*otherwise, *method.notes]
        tracker.summary(result)
        record.finish(result)
    checkpoints.clear()
    finished = record.result()
    assert finished is not None
    return finished


@dataclass
class Ready:
    """What a run needs before its first step; making it finds every mistake in data and model."""

    task: Task
    tokenizer: PreTrainedTokenizerFast
    network: PreTrainedModel
    data: dict[str, glue.Tokenised]
    device: torch.device
    notes: list[str]
    whole: bool = False
    """The model's outputs depend on padding, so that its batches are not cut."""
    otherwise: list[str] = field(default_factory=list)
    """Notes on what is done otherwise than was asked, for the result."""


def prepare(config: Config, device: torch.device | None = None) -> Ready:
    """Loads data and model, onto the device that the configuration asks for where none is given. Raises UserError, one
    line, where either cannot be used."""
    of_device = notes_of_device(config) if device is None else []
    device = choose_device(config) if device is None else device
    task = config.task
    tokenizer = models.load_tokenizer(config.model)
    of_model: list[str] = []
    network = models.build(config, task.num_labels, tokenizer, of_model)
    with memory_said(device):
        torch.nn.Module.to(network, device)
        models.require_precision(config, network, tokenizer)
        models.require_words(config, network, tokenizer)
    if device.type == "cpu":
        use_fast_dropout(network)
    else:
        prepare_for_gpu(network, torch.bfloat16 if config.train.precision == "bfloat16" else None)
    data, notes = load_data(config, tokenizer)
    if not (config.model.path or config.model.id or task.builtin):
        name = config.model.name
        notes = [*notes, f"model={name} is made for the built-in tasks: it starts from scratch, and spells other words "
                         "letter by letter; model=encoder model.path=DIR takes one that was trained"]  # fmt: skip
    whole = models.depends_on_padding(network, tokenizer, config.train.max_length)
    otherwise = [f"{type(network).__name__}'s outputs depend on padding: batches are not cut by length"] * whole
    return Ready(task, tokenizer, network, data, device, [*of_device, *of_model, *notes], whole, otherwise)


def load_data(config: Config, tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, glue.Tokenised], list[str]]:
    """(the splits as the run sees them, "heldout" among them where there is one and labels as noisy as it has them;
    notes for the user). Raises UserError where they cannot be read."""
    task = config.task
    source = config.data
    splits = glue.load(task, source.source, root=source.root, revision=source.revision)
    if hidden := [split for split, rows in splits.items() if rows.labels is None]:
        raise UserError(
            f"{task.name}: the data of its split '{hidden[0]}' have no labels, which training or scores need"
        )
    key = glue.fingerprint(task, source.source, root=source.root, revision=source.revision)
    data = glue.tokenise(task, splits, tokenizer, config.train.max_length, config.paths.cache, key)
    if config.selection == "heldout":
        (train,) = task.train
        kept, held = held_out(len(data[train]))
        if not len(kept):
            raise UserError(f"selection=heldout leaves nothing of {task.name}'s training set of {len(held)} row: take "
                            "selection=dev, or a larger one")  # fmt: skip
        data = data | {"heldout": data[train].take(held), train: data[train].take(kept)}
    if source.noisy:
        shares = {task.train[0]: source.label_noise, "heldout": source.heldout_noise}
        spoilt = {split: share for split, share in shares.items() if share and split in data}
        data |= {split: glue.noisy(task, data[split], share, source.noise_seed) for split, share in spoilt.items()}
    notes = [*_cut(task, data, config.train.max_length), *_unmarked(task, data[task.train[0]], tokenizer)]
    return data, [*splits.notes, *notes, *_not_spoilt(data), *_of_one_label(config, data)]


def _not_spoilt(data: dict[str, glue.Tokenised]) -> list[str]:
    """A note on each split that was to have wrong labels and has none, as a small one."""
    return [
        f"the noise that was asked for leaves each of the {len(examples)} labels of {split} as it was"
        for split, examples in data.items()
        if examples.clean_labels is not None and not np.any(examples.labels != examples.clean_labels)
    ]


def _of_one_label(config: Config, data: dict[str, glue.Tokenised]) -> list[str]:
    """A note on each split by which the epoch is chosen and that can tell no two answers apart."""
    return [
        f"{split}, which chooses the epoch, has a single label ({counted(len(data[split]), 'example')}): no score "
        "there tells a better model from a worse one"
        for split in (["heldout"] if config.selection == "heldout" else config.task.evaluation)
        if (labels := data[split].labels) is not None and len(np.unique(labels)) == 1
    ]


def _cut(task: Task, data: dict[str, glue.Tokenised], most: int) -> list[str]:
    """A note on each split of which more than a hundredth of the texts is cut, in training and in scoring."""
    shares = {split: float((data[split].lengths >= most).mean()) for split in (*task.train, *task.evaluation)}
    return [
        f"{100 * share:.0f} % of the {split} texts reach train.max_length={most} tokens; what is beyond is cut off"
        for split, share in shares.items()
        if share > CUT
    ]


def _unmarked(task: Task, examples: glue.Tokenised, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """A note where nothing tells a pair's sentences apart: GPT-2's tokenizer puts them one behind the other."""
    more = tokenizer.num_special_tokens_to_add(pair=True) - tokenizer.num_special_tokens_to_add(pair=False)
    if len(task.text) < 2 or more or (examples.token_type_ids is not None and examples.token_type_ids.any()):
        return []
    return ["the tokenizer puts no mark between the two sentences of a row: the model cannot tell where one ends"]


def make_method(config: Config, network: PreTrainedModel) -> Method:
    """The method that `config.optimizer` describes. UserError where it does not go with the model."""
    try:
        return METHODS[config.optimizer.method](network, seed=config.seeds.data, **config.optimizer.options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer={config.optimizer.name} with model={config.model.name}: {error}") from None


def packing_of(config: Config, ready: Ready, method: Method) -> tuple[PaddingFree | None, list[str]]:
    """What runs the method's passes without padding where `config` wants that and the model allows it, and notes where
    it does not."""
    if config.train.padding != "free":
        return None, []
    return padding_free(ready.network, ready.data[ready.task.train[0]], method, ready.whole)


def summarise(config: Config, run_id: str, task: Task, data: dict, state: State, network, device) -> dict:
    """What result.json holds."""
    seen = trained_examples(config, data[task.train[0]])
    steps = max(1, state.step)
    epochs, further = divmod(state.step, -(-seen // config.train.batch_size))
    taken = epochs * seen + min(further * config.train.batch_size, seen)  # an epoch's last batch may be smaller
    return {
        "record_version": RECORD_VERSION,
        "id": run_id,
        "task": task.name,
        "task_label": config.task_label,
        "model": config.model.name,
        "optimizer": config.optimizer.name,
        "seed": config.seed,
        "seeds": vars(config.seeds),
        "status": "diverged" if state.diverged else "finished",
        "diverged": state.diverged,
        "experiment": config.experiment,
        "metric": glue.headline_name(task),
        "best": best(state.evaluations),
        "last": state.evaluations[-1] if state.evaluations else None,
        "evaluations": state.evaluations,
        "majority": glue.majority(task, {s: data[s].labels for s in task.evaluation}),
        "hyperparameters": hyperparameters(config),
        "train": {
            "steps": state.step,
            "examples": seen,
            "seconds": state.seconds,
            "seconds_per_step": state.seconds / steps,
            "examples_per_second": taken / state.seconds if state.seconds else None,
            # In units of one training pass, of which a no-grad forward is about a third.
            "passes_per_step": (state.forwards + 2 * state.backwards) / 3 / steps,
            "forwards_per_step": state.forwards / steps,
            "backwards_per_step": state.backwards / steps,
            "peak_memory_bytes": peak_memory(device),
            "device_memory_bytes": memory_in_use(device),
        },
        "weights_sha256": weights_digest(network),
    }


def trained_examples(config: Config, examples: glue.Tokenised) -> int:
    return min(len(examples), config.train.max_train_examples or len(examples))


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # of this program alone: ru_maxrss also counts what the process was before it started this one
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def weights_digest(network: torch.nn.Module) -> str:
    """sha256 over names, shapes and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
