"""What README.md tells a reader to type works."""

import json
import re
import runpy
import shlex
import subprocess
import sys
import zipfile
from collections import Counter
from importlib.metadata import metadata

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from packaging.specifiers import SpecifierSet
from scipy import stats
from torch.optim.lr_scheduler import LambdaLR
from transformers import BertConfig, BertForSequenceClassification

from dsam.overrides import check
from dsam.results.statistics import sign_flip_test, t_interval
from dsam.submission import make
from dsam.text import published

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("python", "sh")}
LINES = [line for block in BLOCKS["sh"] for line in block.replace("\\\n", " ").splitlines()]


def test_the_library_example_trains():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
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
    lines = [*LINES, *"\n".join(re.findall(r"```sh\n(.*?)```", pages, re.DOTALL)).splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python experiments/")]
    assert len(commands) >= 8
    for _, script, *arguments in commands:
        assert (ROOT / script).exists()
        if script == "experiments/submission.py":
            assert make.parse(arguments).model == "minilm"
        elif "--config-dir" not in arguments:  # a folder of the reader's
            check([a for a in arguments if "=" in a and not a.startswith("-")], ROOT / "conf")


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


def test_the_finding_is_what_its_table_says():
    table = pd.read_csv(ROOT / "results" / "tables" / "label_noise_chosen" / "main.csv").set_index("method")
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("−", "-")
    figures = r"([\d.]+)[^(]*\((?:95 % interval )?(-?[\d.]+) to ([\d.]+)\)"
    after = r"([\d.]+) \((-?[\d.]+) to ([\d.]+)\)"
    for method, phrase in (("sam", f"SAM is {figures}"), ("dsam", f"δ-SAM {figures}"), ("asam", f"ASAM {figures}"),
                           ("per_instance", f"exact per-instance perturbation {figures}"),
                           ("adamw_low_lr", f"AdamW gains {after} at half the rate"),
                           ("adamw_quarter_lr", f"{after} at a quarter and"),
                           ("adamw_eighth_lr", f"{after} at an eighth")):  # fmt: skip
        row = 100 * table.loc[method, ["difference", "low", "high"]].astype(float)
        said = re.findall(phrase, " ".join(text.split()))
        assert len(said) == 1
        assert all(abs(float(x) - value) <= 0.051 for found in said for x, value in zip(found, row, strict=True))


def test_the_table_of_what_was_found_is_that_of_the_tables():
    places = [("label_noise_chosen", "main"), ("label_noise_20_chosen", "main"),
              ("label_noise_20_chosen", "last_epoch"), ("label_noise_none_chosen", "main")]  # fmt: skip
    tables = [pd.read_csv(ROOT / "results" / "tables" / f / f"{name}.csv").set_index("method") for f, name in places]
    for method in ("sam", "dsam", "per_instance", "adamw_2x"):
        rows = [100 * table.loc[method, ["difference", "low", "high"]].astype(float) for table in tables]
        cells = " | ".join("{:+.1f} [{:+.1f}, {:+.1f}]".format(*row) for row in rows)
        assert re.search(rf"^\| {method}( \([^|]*\))? \| {re.escape(cells)} \|$", README, re.M), cells
    cells = []
    for table in tables:
        there = "adamw_quarter_lr" in table.index
        row = [100 * float(table.loc["adamw_quarter_lr", n]) for n in ("difference", "low", "high")] if there else None
        cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*row) if row else "not run")
    assert f"| adamw_quarter_lr (a quarter of the learning rate) | {' | '.join(cells)} |" in README


def all_of(experiment):
    """The results of the runs that lie in results/records."""
    with zipfile.ZipFile(ROOT / "results" / "records" / f"{experiment}.zip") as held:
        return [json.loads(held.read(name)) for name in held.namelist() if name.endswith("result.json")]


def records_of(experiment):
    """{(optimizer, seed): result}; the last of a grid's."""
    return {(r["optimizer"], r["seed"]): r for r in all_of(experiment)}


def test_what_is_said_of_the_rate_under_noise_is_what_the_records_say():
    grid, runs, fit = (records_of(name) for name in ("label_noise", "label_noise_chosen", "label_noise_fit"))

    def over(method, other, which):
        """(mean, low, high) of the five paired differences, and the differences."""
        found = 100 * np.array([runs[method, s][which]["score"] - runs[other, s][which]["score"] for s in range(1, 6)])
        return (found.mean(), *stats.ttest_1samp(found, 0).confidence_interval()), found

    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    page = text.split("### The learning rate under noise")[1].split("\n### ")[0]
    lines = [line.replace("**", "") for line in page.splitlines()]
    rates = {"adamw": "1e-4", "adamw_low_lr": "5e-5", "adamw_quarter_lr": "2.5e-5", "adamw_eighth_lr": "1.25e-5"}
    heldout = {}
    for method, rate in rates.items():
        first = grid[method, 0]["best"]
        heldout[method] = first["heldout_score"]
        from_ = fit if method == "adamw" else runs
        ends = [from_[method, s]["evaluations"][-1].get("memorised") for s in range(1, 6)]
        fitted = [f"{20 * sum(e[k]['accuracy'] for e in ends):.0f}" if all(ends) else "" for k in ("flipped", "clean")]
        beyond = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*over("sam", method, which)[0]) for which in ("best", "last")]
        cells = [rate, f"{100 * first['heldout_score']:.1f}", f"{first['epoch']:g}", *fitted, *beyond]
        assert f"| {' | '.join(cells)} |".replace("|  |  |", "| | |") in lines, cells
    assert max(heldout, key=heldout.get) == "adamw_quarter_lr"
    methods = {method for method, _ in runs if "adamw" not in method}
    rows = {line.split(" | ")[0]: line for line in lines if re.match(r"\| [a-z_]+ \|[^|]*\|[^|]*\|$", line)}
    assert {name.strip("| ") for name in rows} - {"method", "rate"} == methods
    for method in methods:
        cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*over(method, "adamw_quarter_lr", k)[0]) for k in ("best", "last")]
        assert rows[f"| {method}"] == f"| {method} | {' | '.join(cells)} |"
    unclear = {"asam", "m_sam"}
    assert all(over(m, "adamw_quarter_lr", "last")[0][1] < 0 for m in unclear)
    clear = {m: over(m, "adamw_quarter_lr", "last")[0] for m in methods - unclear - {"sam_quarter_lr"}}
    means = [mean for mean, *_ in clear.values()]
    assert f"by {min(means):.1f} to {max(means):.1f} points, in intervals" in " ".join(page.split())
    assert all(low > 0 for _, low, _ in clear.values())
    assert all(over(m, "adamw_quarter_lr", "best")[0][1] < 0 for m in methods)
    (best, _), (last, each) = (over("sam", "adamw_quarter_lr", which) for which in ("best", "last"))
    assert each.min() > 0
    brief = ["{:.1f} ({:.1f} to {:.1f})".format(*found).replace("-", "−") for found in (best, last)]
    slower = ["{:.1f} ({:.1f} to {:.1f})".format(*over(m, "adamw", "last")[0]) for m in ("adamw_quarter_lr", "sam")]
    flat = " ".join(text.split())
    assert f"Beyond AdamW at a quarter SAM has {brief[0]} there and {brief[1]} at the last epoch, in each" in flat
    assert f"SAM has {brief[0]} and {brief[1]} ([table]" in README
    own = [over("sam_quarter_lr", "adamw_quarter_lr", which) for which in ("best", "last")]
    assert own[1][1].min() > 0
    short = ["{:.1f} ({:.1f} to {:.1f})".format(*found).replace("-", "−") for found, _ in own]
    itself = "SAM at a quarter itself, with a ρ that was chosen there, is {} beyond AdamW at that rate, and {} at"
    assert itself.format(*short) in flat
    assert f"SAM at a quarter itself, its ρ chosen there, has {short[0]} and {short[1]}." in README
    full = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*found) for found, _ in own]
    full[0] = full[0].replace("-", "−", 1)
    flat_page = " ".join(page.split())
    assert (
        f"SAM is {full[0]} from AdamW at the same rate at the chosen epoch, and {full[1]} at the last, where"
        in flat_page
    )
    faster = ["{:.2f} [{:+.2f}, {:+.2f}]".format(*over("sam", "sam_quarter_lr", k)[0]) for k in ("best", "last")]
    assert f"is above SAM at a quarter, by {faster[0]} and {faster[1]}." in flat_page
    wrong = [
        f"{20 * sum(runs[m, s]['last']['memorised']['flipped']['accuracy'] for s in range(1, 6)):.0f}"
        for m in ("sam_quarter_lr", "adamw_quarter_lr")
    ]
    assert f"they fit {wrong[0]} and {wrong[1]} % of the wrong labels" in flat_page
    best_of = {
        method: max(r["best"]["heldout_score"] for r in all_of("label_noise") if r["optimizer"] == method)
        for method in ("sam_quarter_lr", "sam")
    }
    assert "prefers the slower one, with {:.1f} beside {:.1f}".format(*(100 * x for x in best_of.values())) in flat_page
    assert f"and {slower[0]} at the last, where SAM gains {slower[1]}" in README


def test_what_is_said_of_right_labels_is_what_the_table_says():
    table = pd.read_csv(ROOT / "results" / "tables" / "label_noise_none_chosen" / "main.csv").set_index("method")
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("−", "-").split())
    for method, name in (("sam", "SAM's difference is"), ("dsam", "and δ-SAM's"), ("per_instance", "gains[^,.]*,")):
        row = 100 * table.loc[method, ["difference", "low", "high"]].astype(float)
        said = re.findall(rf"{name} (-?[\d.]+)(?: points)? \((-?[\d.]+) to (-?[\d.]+)\)", text)
        assert len(said) == 1, (method, said)
        assert all(abs(float(x) - value) <= 0.051 for found in said for x, value in zip(found, row, strict=True))


def test_what_is_said_of_fitted_labels_is_what_the_records_say():
    said = re.findall(
        r"(\d+) % (?:of the wrong labels )?and (\d+) %", (ROOT / "docs" / "results.md").read_text("utf-8")
    )
    with zipfile.ZipFile(ROOT / "results" / "records" / "label_noise_fit.zip") as held:
        results = [json.loads(held.read(name)) for name in held.namelist() if name.endswith("result.json")]
    assert len(results) == 20
    found = {}
    for method in ("adamw", "sam", "per_instance"):
        last = [r["evaluations"][-1]["memorised"] for r in results if r["optimizer"] == method]
        found[method] = tuple(
            f"{100 * sum(m[which]['accuracy'] for m in last) / 5:.0f}" for which in ("flipped", "clean")
        )
    for method in ("adamw", "sam", "per_instance"):
        assert said.count(found[method]) == 1, (method, found, said)
    assert f"fitting {found['adamw'][0]} % of the wrong labels, SAM {found['sam'][0]} %" in README


def test_the_gains_beside_adamw_on_the_same_machine_are_those_of_the_records():
    scores, on_gpu = {}, Counter()
    for experiment in ("label_noise_chosen", "label_noise_fit"):
        with zipfile.ZipFile(ROOT / "results" / "records" / f"{experiment}.zip") as held:
            for name in held.namelist():
                if name.endswith("result.json"):
                    r = json.loads(held.read(name))
                    scores[experiment, r["optimizer"], r["seed"]] = r["best"]["score"], r["last"]["score"]
                    made = json.loads(held.read(name.replace("result.json", "provenance.json")))
                    on_gpu[r["optimizer"]] += experiment == "label_noise_chosen" and "NVIDIA" in made["device"]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    page = page.split("### Beside AdamW on the same machine")[1].split("\n### ")[0]
    methods = {method for method, number in on_gpu.items() if number >= 3}
    said = dict(re.findall(r"^\| (\w+)(?: \(m = 8\))? \| (.*) \|$", page, re.M))
    assert said.keys() - {"method"} == methods
    gains = []
    for method in methods:
        cells = []
        for k in (0, 1):
            own, adamw = (
                np.array([scores[experiment, name, seed][k] for seed in range(1, 6)])
                for experiment, name in (("label_noise_chosen", method), ("label_noise_fit", "adamw"))
            )
            low, high = stats.ttest_1samp(own - adamw, 0).confidence_interval()
            cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * x for x in ((own - adamw).mean(), low, high))))
        assert said[method] == " | ".join(cells)
        gains.append(100 * (own - adamw).mean())
    for text in (README, (ROOT / "docs" / "results.md").read_text(encoding="utf-8")):
        shown = [f"{float(said[method].split()[0]):.1f}" for method in ("sam", "dsam", "per_instance")]
        assert "gains are {}, {} and {}".format(*shown) in " ".join(text.split())


@pytest.mark.parametrize("experiment, section, end", [
    ("label_noise_20", "### Half as many wrong labels", "\nThe seeds of what was chosen"),
    ("label_noise_mpnet", "### On an encoder of BERT-base's size", "\nChosen were"),
    ("label_noise", "**SAM at that rate adds nothing", "\nThe chosen ρ"),  # of SAM at a quarter of the rate
])  # fmt: skip
def test_the_rows_of_a_grid_are_its_records(experiment, section, end):
    rows = []
    with zipfile.ZipFile(ROOT / "results" / "records" / f"{experiment}.zip") as held:
        for name in held.namelist():
            if not name.endswith("result.json"):
                continue
            result = json.loads(held.read(name))
            given = yaml.safe_load(held.read(name.replace("result.json", "config.yaml")))
            method, best, last = result["optimizer"], result["best"], result["evaluations"][-1]
            if experiment == "label_noise" and method != "sam_quarter_lr":
                continue
            rho = "" if "adamw" in method else f" {given['model']['rho']:g}"
            scores = f"{100 * best['heldout_score']:.1f} | {best['epoch']:g} | {100 * best['score']:.1f}"
            wrong, right = (100 * last["memorised"][which]["accuracy"] for which in ("flipped", "clean"))
            rows.append(f"| {method} |{rho} | {scores} | {100 * last['score']:.1f} | {wrong:.0f} | {right:.0f} |")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split(section)[1].split(end)[0]
    lines = [" ".join(line.replace("**", "").split()) for line in page.splitlines()]
    assert sorted(line for line in lines if re.match(r"\| (adamw|sam|dsam|per)", line)) == sorted(rows)


@pytest.mark.parametrize("experiment, task, start", [
    ("label_noise_20_chosen", "sst2 noise 0.2", "The seeds of what was chosen"),
    ("label_noise_mpnet_chosen", "sst2 noise 0.4", "\nChosen were"),
])  # fmt: skip
def test_the_seeds_of_what_was_chosen_are_those_of_the_tables(experiment, task, start):
    """Also the number of seeds of each method, as long as some have more than others."""
    folder = ROOT / "results" / "tables" / experiment
    tables = [pd.read_csv(folder / f"{name}.csv").set_index("method") for name in ("main", "last_epoch")]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split(start)[1]
    lines = [" ".join(line.replace("**", "").split()) for line in page.split("\n### ")[0].splitlines()]
    for method in tables[0].index[tables[0][f"{task} count"] > 1]:
        cells = [str(int(tables[0].loc[method, f"{task} count"]))]
        for table in tables:
            row = table.loc[method]
            cells.append(f"{100 * row[f'{task} mean']:.2f} ± {100 * row[f'{task} sd']:.2f}")
            difference = [100 * row[name] for name in ("difference", "low", "high")]
            shown = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*difference) if row["low"] == row["low"] else ""
            cells.append(shown)
        expected = f"| {method} | {' | '.join(cells)} |".replace("  ", " ")
        assert expected in lines, expected


def test_what_is_said_of_noise_0_2_is_what_the_tables_say():
    folder = ROOT / "results" / "tables" / "label_noise_20_chosen"
    tables = [pd.read_csv(folder / f"{name}.csv").set_index("method") for name in ("main", "last_epoch")]
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("−", "-").split())
    figures = r"(-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)"
    said = re.findall(
        rf"20 % flipped SAM gains {figures} at the epoch that a held-out part chooses and {figures}", text
    )
    row = [100 * float(table.loc["sam", name]) for table in tables for name in ("difference", "low", "high")]
    assert len(said) == 1
    assert all(abs(float(x) - value) <= 0.051 for found in said for x, value in zip(found, row, strict=True))
    last = {}
    with zipfile.ZipFile(ROOT / "results" / "records" / "label_noise_20_chosen.zip") as held:
        for name in held.namelist():
            if name.endswith("result.json"):
                result = json.loads(held.read(name))
                last[result["optimizer"], result["seed"]] = result["evaluations"][-1]["score"]
    assert "are above AdamW in each of the five seeds" in text
    by_rate = {}
    for k in ("best", "last"):
        for one, other in (("adamw_quarter_lr", "adamw"), ("sam", "adamw_quarter_lr")):
            runs = records_of("label_noise_20_chosen")
            each = 100 * np.array([runs[one, s][k]["score"] - runs[other, s][k]["score"] for s in range(1, 6)])
            by_rate[one, k] = (each.mean(), *stats.ttest_1samp(each, 0).confidence_interval()), each
    one = "{:.1f} ({:.1f} to {:.1f})"
    slower, beyond = ([one.format(*by_rate[m, k][0]) for k in ("best", "last")] for m in ("adamw_quarter_lr", "sam"))
    there = "quarter of the rate gains {} and {} there, and beyond it SAM has {} and {}."
    assert there.format(*slower, *beyond) in text
    assert f"of the rate SAM gains {beyond[0]} there, and {beyond[1]} at the last epoch." in README
    assert by_rate["sam", "last"][1].min() > 0
    longer = "{:.2f} above {} [{:+.2f}, {:+.2f}]"
    for found, what in ((by_rate["adamw_quarter_lr", "last"][0], "AdamW"), (by_rate["sam", "last"][0], "it"),
                        (by_rate["sam", "best"][0], "it")):  # fmt: skip
        assert longer.format(found[0], what, *found[1:]) in text
    fits = [[100 * runs[m, s]["last"]["memorised"][which]["accuracy"] for s in range(1, 6)]
            for m in ("adamw_quarter_lr", "sam") for which in ("flipped", "clean")]  # fmt: skip
    shown = (
        "fits {:.0f} % of the wrong labels and {:.0f} % of the right ones, fewer of both than SAM ({:.0f} and {:.0f} "
    )
    assert shown.format(*map(np.mean, fits)) in text
    same_cost = pd.read_csv(folder / "equal_compute.csv").set_index("method")
    said = re.search(rf"is SAM's {figures}, δ-SAM's {figures} and per-instance perturbation's {figures}", text).groups()
    rows = [100 * float(same_cost.loc[method, name]) for method in ("sam", "dsam", "per_instance")
            for name in ("difference", "low", "high")]  # fmt: skip
    assert all(abs(float(x) - value) <= 0.051 for x, value in zip(said, rows, strict=True))
    assert all(last[method, seed] > last["adamw", seed] for method in ("sam", "dsam", "per_instance")
               for seed in range(1, 6))  # fmt: skip


def test_what_is_said_of_mpnet_is_what_its_tables_say():
    folder = ROOT / "results" / "tables" / "label_noise_mpnet_chosen"
    tables = [pd.read_csv(folder / f"{name}.csv").set_index("method") for name in ("last_epoch", "main")]
    expected = [f"{100 * t.loc['sam', n]:.1f}" for t in tables for n in ("difference", "low", "high")]
    results = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    one = r"\(([\d.]+) to ([\d.]+)\)"
    figures = rf"([\d.]+) points higher with SAM than with AdamW {one}, and ([\d.]+) {one}"
    for text in (results, README):
        assert list(re.search(figures, text).groups()) == expected
    page = results.split("### On an encoder of BERT-base's size")[1].split("### A built-in case")[0]
    scores, fitted = {}, {}
    with zipfile.ZipFile(ROOT / "results" / "records" / "label_noise_mpnet_chosen.zip") as held:
        for name in held.namelist():
            if name.endswith("result.json"):
                r = json.loads(held.read(name))
                scores[r["optimizer"], r["seed"]] = 100 * r["last"]["score"], 100 * r["best"]["score"]
                fitted.setdefault(r["optimizer"], []).append(r["last"]["memorised"]["flipped"]["accuracy"])
    ahead = [[scores["sam", s][k] - scores["adamw", s][k] for s in range(1, 6)] for k in (0, 1)]
    assert f"by {min(ahead[0]):.1f} to {max(ahead[0]):.1f} points at the last epoch" in page
    assert f"differ from {min(ahead[1]):.1f} to {max(ahead[1]):.1f}: choosing" in page
    methods = ("sam", "adamw", "adamw_low_lr", "per_instance")
    sam, adamw, low, own = (f"{100 * sum(fitted[m]) / 5:.0f} %" for m in methods)
    assert f"fits {sam} of the wrong labels and AdamW {adamw}" in page
    assert f"and fits {low} of the wrong labels" in page and f"it fits {own} of the wrong labels" in page

    def over(method, other, k):
        """(mean, (low, high)) of the five paired differences, and the differences."""
        found = np.array([scores[method, s][k] - scores[other, s][k] for s in range(1, 6)])
        return found.mean(), stats.ttest_1samp(found, 0).confidence_interval(), found

    for which, what in (("adamw_low_lr", "and fits"), ("adamw_quarter_lr", "fits")):
        slower = over(which, "adamw", 0)[2]
        assert f"by {slower.min():.1f} to {slower.max():.1f} points at the last epoch, {what}" in page
    quarter = 100 * sum(fitted["adamw_quarter_lr"]) / 5
    assert (
        f"fits {quarter:.0f} % of the wrong labels, fewer than SAM" in page and quarter < 100 * sum(fitted["sam"]) / 5
    )
    assert all(over("adamw_quarter_lr", other, 0)[2].min() > 0 for other in ("adamw", "adamw_low_lr"))
    at_quarter = [over("sam", "adamw_quarter_lr", k) for k in (0, 1)]
    both = [number for mean, ends, _ in at_quarter for number in (mean, *ends)]
    nothing = (
        "gains nothing: {:+.2f} [{:+.2f}, {:+.2f}] at the last epoch, {:+.2f} [{:+.2f}, {:+.2f}] at the chosen one"
    )
    assert nothing.format(*both).replace(": -", ": −") in page
    short = ["{:.1f} ({:.1f} to {:.1f})".format(mean, *ends).replace("-", "−") for mean, ends, _ in at_quarter]
    assert f"beyond that SAM has {short[0]} and {short[1]} ([below]" in results
    assert f"and at a quarter {short[0]} and {short[1]}." in README
    gain = ["{:.1f} ({:.1f} to {:.1f})".format(mean, *ends)
            for mean, ends, _ in (over("adamw_quarter_lr", "adamw", k) for k in (0, 1))]  # fmt: skip
    assert f"At a quarter of the rate it gains {gain[0]} and {gain[1]}, and" in results
    heldout = records_of("label_noise_mpnet")
    three = [100 * heldout[m, 0]["best"]["heldout_score"] for m in ("adamw", "adamw_low_lr", "adamw_quarter_lr")]
    assert "with {:.1f}, {:.1f} and {:.1f} from the full rate to a quarter".format(*three) in page
    beyond = [over("sam", "adamw_low_lr", k) for k in (0, 1)]
    shown = ["{:.2f}{} [{:+.2f}, {:+.2f}]".format(mean, after, *ends)
             for (mean, ends, _), after in zip(beyond, (" points at the last epoch", ""), strict=True)]  # fmt: skip
    assert f"SAM gains {shown[0]}, in each of the five seeds, and {shown[1]}" in page and beyond[0][2].min() > 0
    mean, ends, each = over("sam", "per_instance", 0)
    assert "by {:.2f} points in the mean [{:+.2f}, {:+.2f}]".format(mean, *ends) in page and each.min() > 0
    brief = ["{:.1f} ({:.1f} to {:.1f})".format(mean, *ends).replace("-", "−") for mean, ends, _ in beyond]
    assert f"beyond it SAM has {brief[0]} and {brief[1]}" in results
    assert f"half the rate SAM gains {brief[0]} and {brief[1]}" in README
    low = ["{:.1f} ({:.1f} to {:.1f})".format(m, *ends).replace("-", "−")
           for m, ends, _ in (over("adamw_low_lr", "adamw", k) for k in (0, 1))]  # fmt: skip
    assert "at half of SAM's cost, gains {} and {}".format(*low) in results


def test_what_is_said_of_the_levels_together_is_what_their_table_says():
    table = pd.read_csv(ROOT / "results" / "tables" / "label_noise_levels" / "main.csv").set_index("method")
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    one = r"([\d.]+) \(([\d.]+) to ([\d.]+)\)"
    said = re.search(rf"the gains are {one} for SAM, {one} for δ-SAM and {one} for per-instance", page)
    rows = [100 * table.loc[method, name] for method in ("sam", "dsam", "per_instance")
            for name in ("difference", "low", "high")]  # fmt: skip
    assert all(abs(float(x) - value) <= 0.051 for x, value in zip(said.groups(), rows, strict=True))


def test_what_was_asked_beforehand_is_answered_by_its_runs():
    folder = ROOT / "results" / "tables" / "per_instance_clean"
    cells = pd.read_csv(folder / "cells.csv").pivot(index=["task", "seed"], columns="method", values="score")
    assert list(cells.index) == [(task, seed) for task in ("sst2", "stsb") for seed in range(6, 11)]
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    page = text.split("### Again, named beforehand")[1].split("\n### ")[0]
    lines = [" ".join(line.replace("**", "").split()) for line in page.splitlines()]
    ps = {m: sign_flip_test(cells[m] - cells["adamw"])[0] for m in ("sam", "per_instance")}
    holm = {"sam": ps["sam"], "per_instance": 2 * ps["per_instance"]}  # the smaller of two
    for method in ("adamw", "sam", "per_instance"):
        both = [100 * cells.loc[task, method] for task in ("sst2", "stsb")]
        shown = [f"{scores.mean():.2f} ± {scores.std():.2f}" for scores in both]
        if method == "adamw":
            assert f"| adamw | {' | '.join(shown)} | | |" in lines
            continue
        found = interval_of(cells[method] - cells["adamw"])
        assert f"| {method} | {' | '.join(shown)} | {found} | {ps[method]:.3f}, {holm[method]:.3f} |" in lines
    page = " ".join(page.split())
    ahead, beyond = (100 * (cells["per_instance"] - cells[other]) for other in ("adamw", "sam"))
    assert (ahead > 0).sum() == (beyond > 0).sum() == 9
    assert f"by −{-ahead.min():.1f} to {ahead.max():.1f} points" in page
    assert f"{beyond.mean():.2f} in the mean {interval_of(beyond / 100).split(' ', 1)[1]}, p " in page
    assert f"p {sign_flip_test(beyond)[0]:.3f}. Each task" in page
    for task, name in (("sst2", "SST-2"), ("stsb", "STS-B")):
        assert f"{interval_of(ahead[[task]] / 100)[1:]} on {name}" in page
    last = pd.read_csv(folder / "last_epoch.csv").set_index("method").loc["per_instance"]
    of_last = [100 * float(last[name]) for name in ("difference", "low", "high")]
    assert "difference to AdamW is {:.2f} [{:+.2f}, {:+.2f}], Holm p ".format(*of_last) in page
    for short in (text, README):
        said = re.search(
            r"it is ([\d.]+) above AdamW \(([\d.]+) to ([\d.]+), Holm p ([\d.]+)\) and ([\d.]+) above SAM "
            r"\(([\d.]+) to ([\d.]+)\)",
            " ".join(short.split()),
        )
        expected = [ahead.mean(), *(100 * x for x in t_interval(ahead / 100)), holm["per_instance"]]
        expected += [beyond.mean(), *(100 * x for x in t_interval(beyond / 100))]
        assert [float(x) for x in said.groups()] == [round(x, 3 if i == 3 else 1) for i, x in enumerate(expected)]


def interval_of(differences):
    """+0.49 [+0.11, +0.87], of fractions."""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * x for x in (differences.mean(), *t_interval(differences))))


def test_what_the_best_weights_leave_of_sam_s_error_is_what_was_measured():
    measured = pd.read_csv(ROOT / "results" / "approximation" / "measurements.csv")
    measured = measured[(measured["batch"] < 8) & (measured["rho"] <= 0.02)]
    errors = measured.pivot(index=["task", "phase", "rho", "batch"], columns="weighting", values="error")
    left = (errors["hindsight (step)"] / errors["uniform"]).groupby(["task", "phase", "rho"]).mean()
    by_task = left.groupby(["task", "rho"]).mean()
    ends = [round(100 * end) for kind in (by_task, left) for end in (kind.min(), kind.max())]
    page = " ".join((ROOT / "docs" / "approximation.md").read_text(encoding="utf-8").split())
    assert "{} to {} % of SAM's error by task and ρ at ρ ≤ 0.02, {} to {} % by setting".format(*ends) in page


def test_what_is_said_of_an_ascent_under_noise_is_what_was_measured():
    measured = pd.read_csv(ROOT / "results" / "approximation_noise" / "measurements.csv")
    measured = measured[measured["rho"] == 0.01]
    page = (ROOT / "docs" / "approximation.md").read_text(encoding="utf-8")
    names = {"SAM (": "uniform", "δ-SAM's probe |": "probe", "δ-SAM's probe, top 2 layers": "probe (top 2 layers)",
             "`curvature` |": "curvature", "`equalised`: unit gradients": "equalised"}  # fmt: skip
    for start, weighting in names.items():
        own = measured[measured["weighting"] == weighting].groupby("phase")[["wrong_weight", "wrong_pull"]].mean()
        expected = [round(100 * x) for x in own.to_numpy().flatten()]
        assert own.index.to_list() == [25, 100]
        lines = [line for line in page.splitlines() if line.startswith(f"| {start}")]
        assert expected in [[int(x) for x in re.findall(r"(?<=\| )\d+(?= \|)", line)] for line in lines]
    end = measured[measured["phase"] == 100]
    error = end.groupby("weighting")["error"].mean()
    first = end[end["batch"] < 8].groupby("weighting")["error"].mean()
    off = {w: round(100 * (1 - error[w] / error["uniform"])) for w in error.index}
    best = round(100 * (1 - first["hindsight (step)"] / first["uniform"]))
    said = re.search(
        r"weights take off (\d+) % of it, √p_y (\d+) %, the exact weight's root (\d+) %, the exact weight "
        r"(\d+) % and, on its 8 batches, the best in hindsight (\d+) %",
        " ".join(page.split()),
    )
    shown = [off[w] for w in ("gauss_newton", "confidence^0.5", "exact_curvature^0.5", "exact_curvature")]
    assert [int(x) for x in said.groups()] == [*shown, best]
