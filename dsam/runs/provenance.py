"""Where a run's numbers come from: code, versions, machine, data and weights."""

import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


PACKAGE = Path(__file__).parents[1]
SOURCES = ("dsam", "conf", "experiments", "hydra_plugins")  # beside each other: what decides what a run computes


@functools.cache
def git(folder: Path = PACKAGE.parent) -> dict[str, str | bool | None]:
    """The state of the checkout that this code lies in: {"commit", "dirty", "repository"}.

    `repository` is the first commit of the one that was asked, which tells repositories apart without naming a place.
    `dirty`: tracked files differ from the commit, but for the tables and records in results/, which no run reads, or
    there are new ones among the sources, as a new method is. All are None where the code is in no repository, or in one
    that does not track it (a copy inside another project).
    """

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", "dsam/__init__.py") is None:
        return {"commit": None, "dirty": None, "repository": None}
    changed = ask("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    new = ask("ls-files", "--others", "--exclude-standard", "--", *SOURCES)
    dirty = None if changed is None or new is None else bool(changed or new)
    first = ask("rev-list", "--max-parents=0", "HEAD")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": dirty, "repository": first.split()[-1] if first else None}


@functools.cache
def source_digest(folder: Path = PACKAGE.parent) -> str:
    """sha256 over names and bytes of the code and configurations that ran, whatever git says of them."""
    digest = hashlib.sha256()
    for source in SOURCES:
        for file in sorted((folder / source).rglob("*")):
            if file.suffix in (".py", ".yaml", ".txt") and file.is_file():
                digest.update(f"{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes() + b"\n")
    return digest.hexdigest()


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


OF_AN_ATTEMPT = ("source_sha256", "versions", "device", "threads")  # what may round, or compute, otherwise


def going_on(now: dict, before: dict) -> tuple[dict, list[str]]:
    """(`now`, the provenance of a run that goes on, with what the attempts `before` were made with where that is
    something else, in `earlier`; the names of what is another than at one of them)."""
    changed = any(before.get(name) != now[name] for name in OF_AN_ATTEMPT)
    then = [{name: before.get(name) for name in ("git", *OF_AN_ATTEMPT, "started")}] if changed else []
    earlier = [*before.get("earlier", []), *then]
    other = [name for name in OF_AN_ATTEMPT if any(attempt.get(name) != now[name] for attempt in earlier)]
    return now | ({"earlier": earlier} if earlier else {}), other


def provenance(device: "torch.device", identity: dict) -> dict:
    """Everything that a reader needs to tell why two runs differ."""
    import torch  # here, since tables look at versions alone

    return {
        "git": git(),
        "source_sha256": source_digest(),
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "platform": platform.platform(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "pid": os.getpid(),
        "identity": identity,
    }
