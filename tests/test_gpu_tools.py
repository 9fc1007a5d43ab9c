"""The scripts for a GPU machine, rehearsed on the CPU: what they write there must be there."""

import json
import runpy
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools" / "gpu"


@pytest.fixture
def rehearsed(tmp_path, monkeypatch):
    """Runs one of them, in this process, with such settings; gives the folder that it writes into."""

    def run(script, **settings):
        for name, value in {"OUT": str(tmp_path), "GPU_CHECK_DEVICE": "cpu", **settings}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(TOOLS.parent.parent)
        monkeypatch.syspath_prepend(TOOLS)  # as a script's own folder is
        runpy.run_path(str(TOOLS / script), run_name="__main__")
        return tmp_path

    return run


def test_methods_are_compared_with_the_cpu(rehearsed):
    found = json.loads(
        (rehearsed("methods_on_gpu.py", GPU_METHODS="freelb,delta_sam gap") / "methods.json").read_text()
    )
    for method in ("freelb", "delta_sam gap"):
        assert len(found[method]) > 4 and all(value is True for value in found[method].values()), found[method]


def test_families_are_trained_with_and_without(rehearsed):
    found = json.loads((rehearsed("families.py", GPU_FAMILIES="mpnet,fnet") / "families.json").read_text())
    assert set(found) == {f"{family} {case}" for family in ("mpnet", "fnet") for case in ("dsam", "per_instance")}
    assert all(row == {"graph": "none", "finite": True, "largest difference": 0.0} for row in found.values())


def test_a_profile_is_written(rehearsed):
    text = (rehearsed("profile_sam.py", GPU_PROFILE="adamw,per_instance") / "profile.txt").read_text()
    assert text.count("ms a step") == 2 and "per_instance at 4x8" in text


def test_ways_to_compile_a_step_are_compared(rehearsed):
    found = json.loads((rehearsed("compiled.py", GPU_COMPILED="plain") / "compiled.json").read_text())
    assert len(found) == 4 and all(row["ms"] > 0 for row in found.values()), found
    losses = [row["loss"] for row in found.values()]
    assert max(losses) - min(losses) < 1e-3 * losses[0]  # on a CPU all are the same step


def test_every_stage_has_its_script():
    check = (TOOLS / "check").read_text()
    scripts = {line.split("$dir/")[1].split('"')[0] for line in check.splitlines() if line.startswith("stage ")}
    assert scripts and all((TOOLS / script).exists() for script in scripts)
    for script in ("check", "prepare", "parts"):
        assert subprocess.run(["bash", "-n", TOOLS / script], capture_output=True).returncode == 0


def test_a_large_model_arrives_in_parts(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = bytes(range(256)) * 9000  # 2.2 MiB
    (model / "model.safetensors").write_bytes(weights)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    made = subprocess.run(["bash", TOOLS / "parts", ".part", model, "1"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    folders = sorted(tmp_path.glob(".part*"))
    assert len(folders) == 3 and all(sum(f.stat().st_size for f in k.iterdir()) < 1.1 * 2**20 for k in folders)
    seen = subprocess.check_output(["git", "status", "--short", "--ignored", "--", ".part2"], cwd=tmp_path, text=True)
    assert seen.startswith("!!")
    for folder in reversed(folders):  # in any order
        place = {"SCRATCH": str(tmp_path / "there"), "PATH": "/usr/bin:/bin"}
        subprocess.run(["bash", folder / "take"], env=place, check=True, capture_output=True)
    there = tmp_path / "there" / "model"
    assert {path.name for path in there.iterdir()} == {"config.json", "model.safetensors"}
    assert (there / "model.safetensors").read_bytes() == weights
