"""What README.md tells a reader to type works."""

import re
import runpy
import shlex
import subprocess
import sys
from importlib.metadata import metadata

import pytest
import torch
from conftest import ROOT
from packaging.specifiers import SpecifierSet
from torch.optim.lr_scheduler import LambdaLR
from transformers import BertConfig, BertForSequenceClassification

from dsam.overrides import check
from dsam.runs.manifest import configurations_of
from dsam.submission import make
from dsam.text import published

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("python", "sh")}
LINES = [line for block in BLOCKS["sh"] for line in block.replace("\\\n", " ").splitlines()]


def test_the_library_example_trains():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    model = BertForSequenceClassification(config)
    ids = torch.randint(0, 20, (8, 5))
    loader = [{"input_ids": ids, "labels": (ids[:, 0] > 9).long()}] * 30
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    names = {"torch": torch, "model": model, "loader": loader, "optimizer": optimizer}
    names["scheduler"] = LambdaLR(optimizer, lambda step: 1.0)
    (example,) = BLOCKS["python"]
    first = names | {"loader": loader[:1]}
    exec(example, first)
    exec(example, names)
    assert names["loss"] < 0.5 * first["loss"]


def test_the_locked_packages_are_for_the_oldest_python_that_is_promised():
    """Debian 12 has 3.11.2."""
    (oldest,) = set(re.findall(r"Python ≥ (3\.\d+)", README))
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    asked = {name: metadata(name).get("Requires-Python") or "" for name in locked}
    assert len(asked) > 100
    assert [f"{name}: {python}" for name, python in asked.items() if f"{oldest}.0" not in SpecifierSet(python)] == []


def test_every_make_target_and_experiment_named_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"\bmake ([a-z-]+)", README)
    assert named
    assert set(named) <= targets
    for experiment in re.findall(r"EXPERIMENT=(\w+)", README):
        assert (ROOT / "conf" / "experiment" / f"{experiment}.yaml").exists()


def test_every_command_line_is_one_that_its_script_takes():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    lines = [*LINES, *"\n".join(re.findall(r"```sh\n(.*?)```", pages, re.DOTALL)).replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python experiments/")]
    assert len(commands) >= 8
    for _, script, *arguments in commands:
        assert (ROOT / script).exists()
        if script == "experiments/submission.py":
            assert make.parse(arguments).model == "bert_base"
        elif "--config-dir" not in arguments:  # a folder of the reader's
            settings = [a for a in arguments if "=" in a and not a.startswith("-")]
            check(configurations_of(settings) if script == "experiments/paper.py" else settings, ROOT / "conf")


def test_every_page_named_is_there():
    named = re.findall(r"\]\(([^):#]+)\)", README)
    assert len(named) > 15 and all((ROOT / path).exists() for path in named)


PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*.md")])
QUOTED = [
    (page.name, block.replace("\\\n", " ").strip())
    for page in PAGES
    for block in re.findall(r"^    (python experiments/(?:.*\\\n)*.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize(("page", "line"), QUOTED)
def test_every_command_that_a_page_quotes_is_one_that_its_script_takes(page, line, monkeypatch):
    _, script, *arguments = shlex.split(line)
    settings = [a for a in arguments if re.match(r"[a-z_./]+=", a) and not re.match(r"(cola|rte|mrpc|sst2)=", a)]
    check([a for a in settings if not a.startswith("task=") or script.endswith("train.py")], ROOT / "conf")
    if not script.endswith(("train.py", "paper.py")):  # those take settings alone
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        assert runpy.run_path(str(ROOT / script))["arguments"]().settings == settings


def test_the_pages_quote_commands():
    assert len(QUOTED) >= 4


def test_the_migration_page_shows_the_same_training_twice():
    """Its second block is run; its first, in our own words, is the two-step algorithm by hand."""
    from torch.nn import functional as F

    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    *_, after = re.findall(r"```python\n(.*?)```", text, re.S)
    trained = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        loader = [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,))) for _ in range(3)]
        if ours:
            exec(after, {"torch": torch, "F": F, "model": model, "loader": loader})
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for x, y in loader:
                first = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
                norm = torch.cat([g.flatten() for g in first]).norm()
                before = [p.detach().clone() for p in model.parameters()]
                for p, g in zip(model.parameters(), first, strict=True):
                    p.data.add_(0.05 * g / norm)
                F.cross_entropy(model(x), y).backward()
                for p, w in zip(model.parameters(), before, strict=True):
                    p.data.copy_(w)
                optimizer.step()
                optimizer.zero_grad()
        trained.append([p.detach() for p in model.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_nothing_published_names_a_folder_of_the_machine_that_made_it():
    listed = subprocess.check_output(["git", "ls-files", "results", "docs", "README.md", "conf"], cwd=ROOT, text=True)
    texts = [path for path in listed.split() if path.endswith((".md", ".json", ".csv", ".yaml", ".tex", ".html"))]
    assert len(texts) > 50
    folder = re.compile(r"(?<![\w.:/])/(tmp|home|root|work|Users|mnt|var|scratch)/")
    named = [path for path in texts if folder.search((ROOT / path).read_text(encoding="utf-8"))]
    assert not named, named


def test_a_published_command_has_placeholders_for_folders():
    given = ["/a/b/experiments/train.py", "model.path=/x/y", "data.root='~/glue'", "task=rte", "--out", "/o", "x=a/b"]
    expected = "experiments/train.py model.path=DIR data.root=DIR task=rte --out DIR x=a/b"
    assert published(given) == expected
