"""What a training step of each method costs: all in turn on the same batches, ratios of medians.

python experiments/benchmark.py task=rte,cola model=minilm model.path=DIR data=local data.root=DIR

Settings are those of train.py (device.threads, train.precision, train.batch_size, …). Writes results/benchmark.json
and .md. With --throughput: plain fine-tuning beside Hugging Face's Trainer instead, in results/throughput.json and .md.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsam.benchmark import steps, table, throughput
from dsam.command_line import one_line_errors
from dsam.config import CONF, Config
from dsam.errors import Parser, UserError, did_you_mean
from dsam.overrides import check, compose_config
from dsam.runs.run import choose_device


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(steps.CONTENDERS), metavar="NAME")
    parser.add_argument("--batches", type=int, default=4, help="batches of an epoch, the same for all methods")
    parser.add_argument("--rounds", type=int, default=5, help="times that each method takes them all")
    parser.add_argument("--throughput", action="store_true", help="examples per second beside Trainer's")
    parser.add_argument("--out", type=Path, help="default: results/benchmark.json or results/throughput.json")
    parser.add_argument("settings", nargs="*", help="settings as for train.py; task may be a list: task=rte,cola")
    return parser.parse_intermixed_args()


def main() -> None:
    given = arguments()
    if min(given.batches, given.rounds) < 1:
        raise UserError("batches and rounds must be at least 1")
    for name in given.methods:
        if name not in steps.CONTENDERS:
            raise UserError(f"unknown method '{name}'; {did_you_mean(name, steps.CONTENDERS)}")
    tasks = [s.split("=", 1)[1].split(",") for s in given.settings if s.startswith("task=")]
    rest = [s for s in given.settings if not s.startswith("task=")] + ["tracking=disabled"]
    measured = {}
    for task in tasks[-1] if tasks else ["agreement"]:
        config = Config.load(compose_config(check([f"task={task}", *rest], CONF), CONF))
        if given.throughput:
            measured[task] = throughput.measure(config, given.batches, given.rounds)
        else:
            measured[task] = steps.measure(config, given.methods, given.batches, given.rounds)
    device = choose_device(config)
    settings = {"model": config.model.name, "threads": config.device.threads, "batches": given.batches}
    settings |= {"rounds": given.rounds} | dataclasses.asdict(config.train)
    out = given.out or Path("results/throughput.json" if given.throughput else "results/benchmark.json")
    table.write(measured, table.speeds if given.throughput else table.rows, device, settings, out)
    print(out.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    with one_line_errors():
        main()
