"""train.py on RTE: twice undisturbed, and killed (SIGKILL) after a checkpoint and continued; are the weights the same?
SAM, and LookSAM, whose checkpoint holds gradients. Writes $OUT/resume.json."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

CARRIED, SCRATCH, DEVICE = Path(os.environ["CARRIED"]), Path(os.environ["SCRATCH"]), os.environ["GPU_CHECK_DEVICE"]
SHORT = (
    [] if DEVICE == "cuda" else ["train.max_steps=8", "train.max_length=16", "train.batch_size=4", "device.threads=1"]
)
MODEL = ["model=minilm", f"model.path={CARRIED}/encoder"]
found = {"device": DEVICE}


def start(name):
    """A run in a folder of its own, `name` being optimizer-anything."""
    settings = [
        "task=rte",
        *MODEL,
        "data=local",
        f"data.root={CARRIED}/glue",
        f"optimizer={name.split('-')[0]}",
        "train.epochs=1",
    ]
    places = [
        f"paths.runs={SCRATCH}/{name}",
        f"paths.cache={SCRATCH}/cache",
        f"device.name={DEVICE}",
        "tracking=disabled",
        "device.deterministic=true",
    ]
    command = [sys.executable, "experiments/train.py", *settings, *places, *SHORT, "checkpoint.every_seconds=0.5"]
    with open(SCRATCH / f"{name}.txt", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def ended(name, process):
    status = process.wait()
    results = list((SCRATCH / name).rglob("result.json"))
    if status or not results:
        found[name] = {"status": status, "said": (SCRATCH / f"{name}.txt").read_text()[-300:]}
        return
    result = json.loads(results[0].read_text())
    train = result["train"]
    found[name] = {
        "weights": result["weights_sha256"][:16],
        "score": result["best"]["score"],
        "ms a step": round(1000 * train["seconds_per_step"], 2),
        "peak GB": round(train["peak_memory_bytes"] / 1e9, 2),
    }


def killed(name):
    """Starts it and kills it once a checkpoint is there."""
    process = start(name)
    while process.poll() is None and not list((SCRATCH / name).rglob("*-*.pt")):
        time.sleep(0.02)
    found[f"{name} had a checkpoint when it was killed"] = process.poll() is None
    process.kill()
    process.wait()


for optimizer in os.environ.get("GPU_RESUME", "sam,looksam").split(","):
    undisturbed = {f"{optimizer}-{k}": start(f"{optimizer}-{k}") for k in ("first", "second")}
    killed(f"{optimizer}-killed")
    ended(f"{optimizer}-killed", start(f"{optimizer}-killed"))
    for name, process in undisturbed.items():
        ended(name, process)
    weights = [found[f"{optimizer}-{k}"].get("weights") for k in ("first", "second", "killed")]
    found[f"{optimizer}: repeated, the same weights"] = weights[0] == weights[1] is not None
    found[f"{optimizer}: killed and continued, the same weights"] = weights[0] == weights[2] is not None
    Path(os.environ["OUT"], "resume.json").write_text(json.dumps(found, indent=1))
print(json.dumps(found, indent=1))
