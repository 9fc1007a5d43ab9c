"""Where a run's numbers come from: code, versions, machine, data and weights."""

import functools
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "hydra-core",
    "omegaconf",
    "wandb",
    "numpy",
    "pandas",
    "scipy",
    "scikit-learn",
)


@functools.cache
def git(folder: str | None = None) -> dict:
    """{"commit", "dirty"} of the checkout that this code lies in; None for both outside one."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=folder or Path(__file__).parent, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


@functools.cache
def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def processor() -> str:
    """The CPU's name as the kernel gives it, with its units for bfloat16: machines of one name differ in them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        units = sorted({"avx512_bf16", "amx_bf16"} & set(about.get("flags", "").split()))
        return f"{about['model name']} ({', '.join(units) or 'no bfloat16 units'})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def provenance(device: torch.device, identity: dict) -> dict:
    """Everything that a reader needs to tell why two runs differ."""
    return {
        "git": git(),
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "platform": platform.platform(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "pid": os.getpid(),
        "identity": identity,
    }
