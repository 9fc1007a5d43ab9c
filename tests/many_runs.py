"""Makes up runs to time the tables with: python tests/many_runs.py 1000 DIR/runs

then  python experiments/paper.py experiment=glue_bert_base paths.runs=DIR/runs \\
          paths.tables=DIR/tables paths.figures=DIR/figures

Eight tasks, five methods, N / 40 seeds; scores are random numbers and the files those of a run of three epochs.
"""

import json
import random
import sys
from pathlib import Path

TASKS = {
    "cola": "matthews_correlation",
    "sst2": "accuracy",
    "mrpc": "f1",
    "stsb": "pearson",
    "qqp": "f1",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
}
METHODS = {
    "adamw": ("plain", 1, {}),
    "adamw_2x": ("plain", 2, {}),
    "sam": ("sam", 2, {"rho": 0.05}),
    "asam": ("asam", 2, {"rho": 0.5}),
    "dsam": ("delta_sam", 2, {"rho": 0.05, "weighting": "probe"}),
}
STEPS = 300


def write(folder: Path, count: int) -> None:
    """`count` finished runs under `folder` and the manifest of their sweep."""
    draw = random.Random(0)
    planned = []
    for k in range(count):
        task, method, seed = list(TASKS)[k // 5 % 8], list(METHODS)[k % 5], k // 40
        name, passes, options = METHODS[method]
        run_id = f"{k:016x}"
        place = folder / task / "minilm" / method / run_id
        place.mkdir(parents=True)
        scores = sorted(draw.gauss(0.8, 0.02) for _ in range(3))
        evaluations = [
            {
                "step": STEPS // 3 * (epoch + 1),
                "epoch": epoch + 1.0,
                "score": score,
                "loss": 1.3 - score,
                "metrics": {"dev": {TASKS[task]: score}},
            }
            for epoch, score in enumerate(scores)
        ]
        hyperparameters = {"method": name, "steps_factor": 1, **options, "epochs": 3, "batch_size": 32, "lr": 1e-4}
        summary = {"id": run_id, "task": task, "model": "minilm", "optimizer": method, "seed": seed}
        result = summary | {
            "status": "finished",
            "metric": TASKS[task],
            "best": evaluations[-1],
            "last": evaluations[-1],
            "evaluations": evaluations,
            "majority": 0.5,
            "hyperparameters": hyperparameters,
            "train": {
                "steps": STEPS,
                "seconds": 100.0 * passes * draw.uniform(0.9, 1.1),
                "seconds_per_step": passes / 3,
                "examples_per_second": 100 / passes,
                "passes_per_step": passes,
                "peak_memory_bytes": 1_400_000_000,
            },
        }
        (place / "result.json").write_text(json.dumps(result, indent=1))
        lines = [
            {"event": "train", "step": step, "loss": 0.7 - step / 1000, "lr": 1e-4} for step in range(10, STEPS, 10)
        ]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        provenance = {"git": {"commit": "0" * 40, "dirty": False}, "versions": {"torch": "2.13.0"}, "device": "CPU"}
        (place / "provenance.json").write_text(json.dumps(provenance | {"threads": 1, "identity": {}}))
        (place / "config.yaml").write_text(f"task: {{name: {task}}}\nseed: {seed}\n")
        planned.append(summary | {"folder": str(place.relative_to(folder)), "hyperparameters": hyperparameters})
    (folder / ".sweeps").mkdir()
    manifest = {"experiment": "glue_bert_base", "command": "tests/many_runs.py", "chosen": [], "runs": planned}
    (folder / ".sweeps" / "glue_bert_base.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    write(Path(sys.argv[2]), int(sys.argv[1]))
