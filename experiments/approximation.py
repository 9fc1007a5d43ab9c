"""Does reweighting bring one perturbation nearer to per-instance perturbation? The oracle over tasks, phases and ρ.

python experiments/approximation.py --tasks cola rte mrpc sst2 --model-path DIR --data-root DIR

Resumable: the same command measures only what measurements.csv, and of each weighting's extra time times.csv, in --out
does not hold. Writes summary.md and a figure beside them; with --summary-only nothing else.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsam.approximation import study, summary, times
from dsam.command_line import one_line_errors
from dsam.config import CONF, Config
from dsam.errors import Parser, UserError
from dsam.overrides import check, compose_config
from dsam.task import shipped

MEASURING = ("tasks", "model_path", "data_root", "phases", "rho", "batches", "batch_size", "headroom")
"""Arguments that say what to measure."""


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["agreement"])
    parser.add_argument("--model-path", help="a local model folder; default: the tiny model")
    parser.add_argument("--data-root", help="official GLUE files; default: the built-in tasks")
    parser.add_argument("--phases", nargs="+", type=int, default=[25, 100], help="per cent of one epoch's fine-tuning")
    parser.add_argument("--rho", nargs="+", type=float, default=[0.005, 0.02, 0.1])
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--headroom", type=int, default=8, help="batches on which the best weights in hindsight are found"
    )
    parser.add_argument(
        "--looked-at", nargs="+", default=[], metavar="TASK=N", help="its first N batches served to choose candidates"
    )
    parser.add_argument("--no-times", action="store_true", help="do not measure each weighting's extra time")
    parser.add_argument("--summary-only", action="store_true", help="measure nothing: summary and figure of --out anew")
    parser.add_argument("--out", type=Path, default=Path("results/oracle"), help="[%(default)s]")
    parser.add_argument("settings", nargs="*", help="further settings of the fine-tuning, e.g. train.lr=1e-4 seed=1")
    given = parser.parse_intermixed_args()
    idle = [name for name in MEASURING if getattr(given, name) != parser.get_default(name)]
    if given.summary_only and idle:
        raise UserError(f"--summary-only measures nothing: --{idle[0].replace('_', '-')} has no effect")
    return given


def main() -> None:
    given = arguments()
    if (
        min(given.batches, given.batch_size) < 1
        or not all(0 < rho < math.inf for rho in given.rho)
        or not all(0 <= p <= 100 for p in given.phases)
    ):
        raise UserError("batches and batch size must be at least 1, every rho above 0, every phase from 0 to 100")
    for name, values in (("tasks", given.tasks), ("phases", given.phases), ("rho", [f"{r:.6g}" for r in given.rho])):
        if len(set(values)) < len(values):
            raise UserError(f"--{name} {' '.join(map(str, values))}: give each once")
    # What stands behind --looked-at may be the settings that follow it.
    tasks = {*given.tasks, *shipped()}
    settings = [pair for pair in given.looked_at if "=" in pair and pair.partition("=")[0] not in tasks]
    pairs = [pair for pair in given.looked_at if pair not in settings]
    try:
        looked_at = {task: int(count) for task, count in (pair.split("=") for pair in pairs)}
    except ValueError:
        raise UserError(f"--looked-at {' '.join(given.looked_at)}: give TASK=N, e.g. cola=10 rte=17") from None
    if any(count < 0 for count in looked_at.values()):
        raise UserError(f"--looked-at {' '.join(pairs)}: a number of batches is 0 or more")
    if given.summary_only and (wrong := [*settings, *given.settings]):
        raise UserError(f"--summary-only measures nothing: {' '.join(wrong)} has no effect")
    common = ["train.epochs=1", "tracking=disabled", f"checkpoint.keep_at={[p for p in given.phases if p]}"]
    if given.model_path:
        common += ["model=minilm", f"model.path={given.model_path}"]
    if given.data_root:
        common += ["data=local", f"data.root={given.data_root}"]
    common += [f"paths.runs={given.out / 'runs'}", *settings, *given.settings]
    measurements, timed = given.out / "measurements.csv", given.out / "times.csv"
    if not given.summary_only:
        there = summary.batches_in(summary.read_rows(measurements)) if measurements.exists() else {}
        batches = there | {task: max(given.batches, there.get(task, 0)) for task in given.tasks}
        summary.require_looked_at(looked_at, batches, measurements)  # before anything is measured
        configs = [Config.load(compose_config(check([f"task={task}", *common], CONF), CONF)) for task in given.tasks]
        study.study(configs, given.phases, given.rho, given.batches, given.batch_size, given.headroom, measurements)
        if not given.no_times:
            times.measure(configs, given.batch_size, timed)
    extra = timed if timed.exists() and not given.no_times else None
    try:
        for path in summary.write(measurements, given.out, looked_at, extra):
            print(path)
    except OSError as error:
        what = error.filename or given.out
        raise UserError(f"cannot write {what}: {error.strerror or error}; set --out DIR") from None


if __name__ == "__main__":
    with one_line_errors():
        main()
