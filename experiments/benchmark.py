"""What a training step of each method costs: all in turn on the same batches, ratios of medians.

python experiments/benchmark.py task=rte,cola model=minilm model.path=DIR data=local data.root=DIR

Settings are those of train.py (device.threads, train.precision, …) that change what is measured. Writes
results/speed/steps.json and .md (what the project measured itself lies in results/benchmark). Instead of the methods:
--what throughput times plain fine-tuning beside Hugging Face's Trainer, --what norms exact per-example gradient norms
beside a backward pass, at full length, --what scaling AdamW's and SAM's steps over batch, length and model shapes
(random weights; no task or model needed; a figure as well), --what shares where the time goes beside the passes, --what
packing how many runs an hour the device does, by how many at once, --what padding AdamW's and SAM's steps by how their
batches are padded, --what checkpoints what one takes of a training. Each writes results/speed/<what>.json and .md, as
the figures come.
"""

import argparse
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dsam.benchmark import checkpoints, norms, packing, padding, scaling, shares, steps, table, throughput
from dsam.command_line import one_line_errors
from dsam.config import CONF, Config, Train
from dsam.errors import Parser, UserError, did_you_mean
from dsam.overrides import check, compose_config
from dsam.training.device import choose_device

MEASURES = {
    "steps": (lambda config, given: steps.measure(config, given.methods, given.batches, given.rounds), table.rows),
    "throughput": (lambda config, given: throughput.measure(config, given.batches, given.rounds), table.speeds),
    "scaling": (lambda config, given: scaling.measure(config, given.shapes, given.points, given.rounds), table.points),
    "shares": (lambda config, given: shares.measure(config, given.batches, given.rounds), table.parts),
    "packing": (
        lambda config, given: packing.measure(config, given.at_once, given.batches, given.rounds),
        table.packed,
    ),
    "padding": (lambda config, given: padding.measure(config, given.batches, given.rounds), table.ways),
    "checkpoints": (lambda config, given: checkpoints.measure(config, given.batches, given.rounds), table.saved),
    "norms": (lambda config, given: norms.measure(config, config.train.max_length, given.rounds), table.costs),
}
"""What can be measured: (how, the rows of its table)."""
USED = {what: {"batches"} for what in MEASURES} | {"norms": set(), "scaling": {"shapes", "points"}}
USED["steps"] |= {"methods"}
USED["packing"] |= {"at_once"}
"""Which of the arguments that only some take each of them does."""
OF_STEPS = {"batch_size", "dropout", "precision", "max_length", "micro_batch_size", "piece_overhead", "padding"}
TAKEN = dict.fromkeys(MEASURES, OF_STEPS) | {"scaling": {"precision"}}
TAKEN["packing"] = OF_STEPS | {"epochs", "max_steps", "max_train_examples"}
TAKEN["shares"] = OF_STEPS | {"max_train_examples"}
"""Which of a training's settings each of them takes up: its time is the same with any of the others."""
IDLE = ("launcher", "checkpoint", "fresh_seeds", "selection", "initialise_from")
"""What changes nothing that is measured here."""


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=steps.contenders(), metavar="NAME")
    parser.add_argument("--shapes", nargs="+", default=list(scaling.SHAPES), choices=list(scaling.SHAPES))
    parser.add_argument("--points", nargs="+", type=point, default=scaling.POINTS, metavar="BATCHxLENGTH")
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="for packing")
    parser.add_argument("--batches", type=int, default=4, help="batches of an epoch, the same for all methods")
    parser.add_argument("--rounds", type=int, default=5, help="times that each method takes them all")
    parser.add_argument("--what", choices=list(MEASURES), default="steps")
    parser.add_argument("--out", type=Path, help="default: results/speed/<what>.json")
    parser.add_argument("settings", nargs="*", help="settings as for train.py; task may be a list: task=rte,cola")
    given = parser.parse_intermixed_args()
    # --methods takes what follows it; settings hold a =, which no method's name does.
    given.settings += [name for name in given.methods if "=" in name]
    given.methods = [name for name in given.methods if "=" not in name] or steps.contenders()
    for name in ("methods", "shapes", "points", "at_once", "batches"):
        if name not in USED[given.what] and getattr(given, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has no effect on --what {given.what}")
    return given


def require_taken(given: argparse.Namespace) -> None:
    """UserError where a setting is given that `--what` does not take up."""
    for setting in given.settings:
        name = setting.lstrip("+").partition("=")[0]
        group, _, of_training = name.partition(".")
        if group == "optimizer" and given.what != "packing":
            instead = ": --methods says which are timed" if given.what == "steps" else ""
            raise UserError(f"{setting} has no effect on --what {given.what}{instead}")
        if group in IDLE or (group == "train" and of_training in set(Train.model_fields) - TAKEN[given.what]):
            raise UserError(f"{setting} has no effect on --what {given.what}: leave it out")


def require_writable(out: Path) -> None:
    """UserError where the figures could not be written once they are there."""
    try:
        if out.suffix != ".json" or out.is_dir():
            raise UserError(f"--out {out} must name a .json file, beside which a .md is written")
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; set --out FILE.json") from None


def point(text: str) -> tuple[int, int]:
    """32x128: 32 rows of 128 tokens."""
    batch, length = map(int, text.split("x"))
    if not (batch >= 1 and 1 <= length <= 512):
        raise ValueError
    return batch, length


def main() -> None:
    given = arguments()
    if min(given.batches, given.rounds, *given.at_once) < 1:
        raise UserError("batches, rounds and the runs at once must be at least 1")
    for name in given.methods:
        if name not in steps.contenders():
            raise UserError(f"unknown method '{name}'; {did_you_mean(name, steps.contenders())}")
    require_taken(given)
    tasks = [s.split("=", 1)[1].split(",") for s in given.settings if s.startswith("task=")]
    rest = [s for s in given.settings if not s.startswith("task=")] + ["tracking=disabled"]
    measure, as_rows = MEASURES[given.what]
    out = given.out or Path("results") / "speed" / f"{given.what}.json"
    require_writable(out)
    measured: dict[str, list] = {}
    of_task: dict[str, dict] = {}
    for task in tasks[-1] if tasks else ["agreement"]:
        config = Config.load(compose_config(check([f"task={task}", *rest], CONF), CONF))
        device = choose_device(config)
        settings = {"threads": config.device.threads, "rounds": given.rounds}
        if given.what == "scaling":
            task, settings = "full rows of random tokens", settings | {"precision": config.train.precision}
        else:
            settings |= {"model": config.model.name}
            settings |= {"batches": given.batches} if "batches" in USED[given.what] else {}
            settings |= {"optimizer": config.optimizer.name} if given.what == "packing" else {}
            settings |= config.train.model_dump(include=TAKEN[given.what])
        of_task[task] = settings
        try:
            for found in measure(config, given):  # what comes late must not cost what is there
                measured.setdefault(task, []).append(found)
                table.write(measured, as_rows, device, of_task, out)
                if given.what == "scaling":
                    scaling.draw(measured[task], out)
        except (BrokenProcessPool, torch.OutOfMemoryError):
            raise UserError("a process of the measurement died, probably for want of memory; measure less") from None
        if given.what == "scaling":
            break  # it has no task
    if not measured:
        raise UserError("nothing fitted the memory: take smaller --shapes or --points")
    print(out.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    with one_line_errors():
        main()
