"""What the tests share: folders, the real command line, the real data where they lie."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GLUE = ROOT.parent / "shared" / "glue"

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # several tests run at once; before torch is imported


def command(*arguments: str, script: str = "train.py", timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """Runs an entry point as a user does, on one thread."""
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=options.pop("cwd", ROOT),
        env=os.environ | options.pop("env", {}),
        **options,
    )


@pytest.fixture
def paths(tmp_path):
    """Overrides that keep a test's runs and caches to itself."""
    return [f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]


@pytest.fixture(scope="session")
def glue_root():
    if not GLUE.is_dir():
        pytest.skip("the real GLUE files are not beside this checkout")
    return GLUE


def pytest_collection_modifyitems(items):
    """Slurm's tests mostly wait: begun first, they wait while the others run."""
    items.sort(key=lambda item: "test_slurm" not in item.nodeid)
