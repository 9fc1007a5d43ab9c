"""The training loop: one function that reads from top to bottom."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..config import Config
from ..errors import NonFiniteGradient, Stopped
from ..glue import Tokenised, compute, headline, headline_name, predictions
from ..methods import Method, example_losses
from ..methods.step import not_finite
from ..progress import Bar
from ..signals import StopSignals
from ..task import Task
from .backward import Backward
from .batches import epoch_order, evaluation_batches, training_subset
from .checkpoint import Checkpoints
from .device import Outcomes, to
from .memorised import memorised
from .padding_free import PaddingFree

LOG_EVERY = 10  # steps
SAVING = 0.05  # most of the time that checkpoints may take from the training


@dataclass
class State:
    """What a training has come to; everything in it is in the checkpoint."""

    step: int = 0
    seconds: float = 0.0  # in training steps only, over all attempts
    forwards: float = 0.0
    backwards: float = 0.0
    window: list[float] = field(default_factory=list)  # losses since the last line of the log
    evaluations: list[dict] = field(default_factory=list)
    diverged: str | None = None


def total_steps(config: Config, examples: int) -> tuple[int, int]:
    """(steps in all, steps between evaluations): `steps_factor` stretches both, so that every method is evaluated,
    and its best epoch chosen, equally often."""
    per_epoch = -(-examples // config.train.batch_size)
    steps = per_epoch * config.train.epochs
    if config.train.max_steps is not None:
        steps = min(steps, config.train.max_steps)
    return steps * config.optimizer.steps_factor, per_epoch * config.optimizer.steps_factor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights that multiply or are looked up decay; biases, by their name (XLNet's have two axes), and normalisation
    (all other tensors of one axis) do not."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p.ndim > 1 and not name.endswith("bias") for name, p in params]
    return [
        {"params": [p for (_, p), this in zip(params, decayed, strict=True) if this], "weight_decay": weight_decay},
        {"params": [p for (_, p), this in zip(params, decayed, strict=True) if not this], "weight_decay": 0.0},
    ]


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Linear from 0 to 1 over the warm-up, then linear to 0 at `total`."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def fine_tune(
    config: Config,
    task: Task,
    data: dict[str, Tokenised],
    model: nn.Module,
    method: Method,
    device: torch.device,
    checkpoints: Checkpoints,
    log: Callable[[dict], None],
    resume: Callable[[dict], None],
    on_best: Callable[[], None] = lambda: None,
    phases: dict[int, list[Callable[[], None]]] | None = None,
    whole: bool = False,
    packing: PaddingFree | None = None,
) -> State:
    """Trains `model` in place and returns what came of it; goes on from the newest checkpoint if there is one.

    Args:
        data: the tokenised splits; trains on the task's training split, evaluates on `task.evaluation`.
        log: takes one record (event "train" or "evaluation") at a time.
        resume: called with the checkpoint's state before training goes on, e.g. to cut the log back to it.
        on_best: called after an evaluation that is the best so far.
        phases: {step: what to call once that step is taken}.
        whole: the model's outputs depend on padding: all of a batch is padded alike, and to no more than its longest.
        packing: what runs the method's passes without padding.
    Raises:
        Stopped: SIGTERM or Ctrl-C came; a checkpoint has been written.
        OSError: a checkpoint could not be written; the earlier ones are still there.
    """
    train = config.train
    examples = data[task.train[0]]
    subset = training_subset(len(examples), train.max_train_examples, config.seeds.data)
    seen = examples.take(subset) if examples.clean_labels is not None else None
    total, evaluate_every = total_steps(config, len(subset))
    per_epoch = -(-len(subset) // train.batch_size)
    warmup = round(train.warmup_ratio * total)
    autocast = torch.bfloat16 if train.precision == "bfloat16" else None

    lr = train.lr * config.optimizer.lr_factor
    optimizer = torch.optim.AdamW(
        parameter_groups(model, train.weight_decay),
        lr=lr,
        betas=train.betas,
        eps=train.eps,
        fused=True,
    )
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, warmup, total))
    torch.manual_seed(config.seeds.data)
    state, outcomes = State(), Outcomes(device)
    saved_at, cost = time.monotonic(), 0.0
    backward = Backward(config, examples, model, method, device, whole, not outcomes.later, packing)

    def read(all_of_them: bool) -> None:
        for one in outcomes.read(all_of_them):
            if not one.finite:
                state.step = one.step - 1  # those after it were not taken either
                state.diverged = f"step {one.step}: {not_finite(one.norm, one.loss)}"
                return
            state.window.append(one.loss)
            state.forwards += one.forwards
            state.backwards += one.backwards

    def save(seconds: float, at_once: bool) -> None:
        """Begins a checkpoint, where the last is so many seconds old, is written, and has cost little of the time
        since; or, `at_once`, writes it whatever that costs."""
        nonlocal saved_at, cost
        writing = checkpoints.writing()
        # Where all cores train, the training lacked what writing took of them.
        enough = 0 if at_once else (cost + checkpoints.worked) / SAVING
        later = writing and not at_once and state.step < total
        if later or time.monotonic() - saved_at < max(seconds, enough):
            return
        began = time.monotonic()
        read(all_of_them=True)
        if state.diverged:
            return
        checkpoints.save(
            state.step,
            {
                "device": device.type,
                "state": vars(state),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "method": method.state_dict(),
                "random": method.random.get(),
            },
        )
        if at_once:
            checkpoints.wait()
        saved_at = time.monotonic()
        cost = saved_at - began

    saved = checkpoints.load(device.type)
    if saved is not None:
        state = State(**saved["state"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        method.load_state_dict(saved["method"])
        method.random.set(saved["random"])
    resume(vars(state))

    model.train()
    order, order_epoch = np.empty(0, dtype=int), -1
    title = f"{task.name} {config.optimizer.name} seed {config.seed}"
    with StopSignals() as stop, Bar(title, total) as bar, checkpoints:
        while state.step < total and not state.diverged:
            started = time.perf_counter()
            epoch, position = divmod(state.step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = subset[epoch_order(len(subset), config.seeds.data, epoch)], epoch
            batch = order[position * train.batch_size : (position + 1) * train.batch_size]
            try:
                loss = backward(batch)
            except NonFiniteGradient as error:
                state.diverged = f"step {state.step + 1}: {error}"
                break
            state.step += 1
            outcomes.add(state.step, loss, method.report)
            if outcomes.later:
                optimizer.found_inf = outcomes.found  # type: ignore[attr-defined]  # read by fused optimizers
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

            logs = state.step % LOG_EVERY == 0 or state.step == total
            evaluates = state.step % evaluate_every == 0 or state.step == total
            read(all_of_them=logs or evaluates or bool(phases and state.step in phases))
            state.seconds += time.perf_counter() - started
            if state.diverged:
                break
            if state.window:
                bar.update(state.step, state.window[-1])
            if logs:
                log(train_record(state, rate, per_epoch, method))
                state.window.clear()

            if phases and state.step in phases:
                for keep in phases[state.step]:
                    keep()
            if evaluates:
                evaluation = evaluate(task, data, model, device, autocast)
                evaluation = {"step": state.step, "epoch": state.step / per_epoch} | evaluation
                if seen is not None:
                    evaluation["memorised"] = memorised(seen, model, device, autocast)
                log({"event": "evaluation"} | evaluation)
                state.evaluations.append(evaluation)
                if not math.isfinite(evaluation["loss"]):  # no gradient comes after the last step to tell
                    state.diverged = (
                        f"step {state.step}: the evaluation's loss is {evaluation['loss']}: it has no score"
                    )
                bar.evaluated(headline_name(task), evaluation["score"])
                if evaluation is best(state.evaluations):
                    on_best()
            asked, every = stop.signum, config.checkpoint.every_seconds
            save(0 if evaluates or asked else every, at_once=bool(asked) or every == 0)
            if asked and state.step < total and not state.diverged:
                raise Stopped(asked)
    return state


def train_record(state: State, lr: float, per_epoch: int, method: Method) -> dict:
    report = {k: float(v) for k, v in method.report.items() if k not in ("forwards", "backwards")}
    return {
        "event": "train",
        "step": state.step,
        "epoch": state.step / per_epoch,
        "loss": sum(state.window) / len(state.window),
        "lr": lr,
        **report,
        "seconds": round(state.seconds, 3),
    }


def best(evaluations: Iterable[dict]) -> dict | None:
    """The evaluation with the highest score to choose by, the earliest of equals; NaN is never the best.

    That is the headline score on the held-out part of the training set where there is one, else the one reported.
    """
    scored = [(e.get("heldout_score", e["score"]), e) for e in evaluations]
    scored = [(score, e) for score, e in scored if score == score]
    return max(scored, key=lambda pair: pair[0], default=(None, None))[1]


def evaluate(
    task: Task, data: dict[str, Tokenised], model: nn.Module, device: torch.device, autocast: torch.dtype | None = None
) -> dict:
    """{"score", "loss", "metrics": {split: {name: value}}} on the task's evaluation splits.

    Score and loss are theirs alone; with a split "heldout" in `data` there is also its "heldout_score". Where a split's
    losses are not finite, its metrics are NaN: the largest of logits that are no numbers is no answer.
    """
    metrics, losses = {}, []
    for split in [*task.evaluation, *(["heldout"] if "heldout" in data else [])]:
        answers, of_split = predict(task, data[split], model, device, autocast)
        labels = data[split].labels
        assert labels is not None
        metrics[split] = compute(task, answers, labels)
        if not torch.isfinite(of_split).all():
            metrics[split] = dict.fromkeys(metrics[split], math.nan)
        if split != "heldout":
            losses.append(of_split)
    scores = {"score": headline(task, metrics)}
    if "heldout" in data:
        scores["heldout_score"] = headline(task, metrics, ["heldout"])
    return scores | {"loss": float(torch.cat(losses).mean()), "metrics": metrics}


@torch.no_grad()
def predict(
    task: Task,
    examples: Tokenised,
    model: nn.Module,
    device: torch.device,
    autocast: torch.dtype | None = None,
    passed: Callable[[int], None] = lambda examples: None,
) -> tuple[np.ndarray, Tensor]:
    """The model's answers without dropout, shape (N,): label numbers or scores; and the losses of the examples that
    have labels, float64 on the CPU, in the order of the batches.

    `passed` is called after each batch with its size.
    """
    was_training = model.training
    model.eval()
    answers = np.zeros(len(examples), dtype=np.float64 if task.num_labels == 1 else np.int64)
    losses = [torch.empty(0, dtype=torch.float64)]
    for indices in evaluation_batches(examples.lengths):
        batch = to(examples.batch(indices), device)
        labels = batch.pop("labels", None)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = model(**batch).logits.float()
        if labels is not None:
            losses.append(example_losses(logits, labels).double().cpu())
        answers[indices] = predictions(task, logits.cpu().numpy())
        passed(len(indices))
    model.train(was_training)
    return answers, torch.cat(losses)
