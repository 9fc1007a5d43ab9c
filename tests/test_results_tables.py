"""Tables of a synthetic sweep, against hand computation and for what a reader sees."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_results_collect import fail, finish, plan, sweep

from dsam.results import plots
from dsam.results.collect import collect
from dsam.results.report import make as report
from dsam.results.report.words import in_words
from dsam.results.tables import build as tables
from dsam.results.tables import rendering
from dsam.results.tables.rendering import Table, as_html, as_latex, as_markdown, escape_latex

pytestmark = pytest.mark.slow

DOCUMENT = r"""\documentclass{article}
\usepackage[paperwidth=60cm,margin=1cm]{geometry}
\usepackage{booktabs}
\begin{document}
%s
\end{document}
"""


def test_main_table_by_hand(runs_dir):
    main = tables.build(collect(runs_dir, "smoke")).main
    text = main.text.set_index("method")
    assert text.loc["adamw", "rte"] == "62.00 ± 2.00 (3)"
    assert text.loc["sam", "rte"] == "68.00 ± 2.83 (2/3, 1 diverged)"
    assert text.loc["adamw", "mrpc"] == "71.33 ± 18.58 (3, 1 degenerate)"
    assert text.loc["sam", "mrpc"] == "82.00 ± 1.41 (2/3, 1 failed)"
    assert text.loc["adamw", "average"] == "66.67" and text.loc["sam", "average"] == "75.00"
    # Pairs: rte +6, +8; mrpc +1, +33: the mean of 7 and 17. All 4 cells go up: p = 2/16.
    assert text.loc["sam", "difference to adamw"].startswith("+12.00 [") and text.loc["sam", "Holm p"] == "0.1250"
    assert list(main.styles.loc[1, ["rte", "mrpc"]]) == ["bold", "bold"]
    assert list(main.styles.loc[0, ["rte", "mrpc"]]) == ["underlined", "underlined"]  # 2 pairs show nothing
    assert main.values.set_index("method").loc["sam", "rte mean"] == (0.66 + 0.70) / 2
    notes = " ".join(main.notes)
    assert "Best epoch" in notes and "flatters" in notes and "over rte, mrpc" in notes
    assert "sam rte seed 2 diverged" in notes and "sam mrpc seed 2 failed" in notes


def test_the_last_epoch_is_another_table_that_says_so(runs_dir):
    main = tables.build(collect(runs_dir, "smoke"), which="last").main
    assert main.text.loc[0, "rte"] == "52.00 ± 2.00 (3, 2 degenerate)"  # of the last epoch: 0.50, 0.52 and 0.54
    assert "last epoch" in main.caption and main.notes[0].startswith("Last epoch")


def test_the_average_is_over_tasks_that_every_method_has(runs_dir):
    sweep(runs_dir, "more", [
        *(plan(task, "tiny", optimizer, 0) for task in ("rte", "mrpc") for optimizer in ("adamw", "sam")),
        plan("cola", "tiny", "sam", 0), plan("rte", "tiny", "never", 0),
    ])  # fmt: skip
    finish(runs_dir, plan("cola", "tiny", "sam", 0), best=0.1)
    main = tables.build(collect(runs_dir, "more")).main
    text = main.text.set_index("method")
    assert text.loc["sam", "average"] == "73.50" and text.loc["adamw", "cola"] == "–"
    assert text.loc["never", "rte"] == "– (0/1, 1 missing)" and text.loc["never", "average"] == "–"
    assert "Average for tiny: over rte, mrpc." in main.notes


def test_a_score_that_was_not_recorded_stays_visible(tmp_path):
    finish(tmp_path, plan(seed=0), best=None)
    finish(tmp_path, plan(seed=1), best=0.6)
    assert tables.build(collect(tmp_path)).main.text.loc[0, "rte"] == "60.00 (1/2, 1 without score)"


def test_runs_that_all_failed_still_make_tables(tmp_path):
    for seed in (0, 1):
        fail(tmp_path, plan(seed=seed))
    built = tables.build(collect(tmp_path))
    tables.write(built, tmp_path / "tables")
    assert built.main.text.loc[0, "rte"] == "– (0/2, 2 failed)" and built.cost.text.empty
    assert list(plots.figures(collect(tmp_path))) == []


def test_models_are_compared_within_themselves(tmp_path):
    for model, base in (("tiny", 0.6), ("large", 0.8)):
        for seed in (0, 1):
            finish(tmp_path, plan("rte", model, "adamw", seed), best=base)
            finish(tmp_path, plan("rte", model, "sam", seed), best=base + 0.01 + 0.001 * seed)
    text = tables.build(collect(tmp_path)).main.text
    assert list(text["model"]) == ["large", "large", "tiny", "tiny"]
    assert list(text["difference to adamw"]) == ["–", "+1.05 [+0.41, +1.69]"] * 2  # 0.05 · t(1) = 0.635


def test_without_a_baseline_there_are_scores_and_a_reason(tmp_path):
    for seed in (0, 1):
        finish(tmp_path, plan(seed=seed))
    main = tables.build(collect(tmp_path)).main
    assert main.text.loc[0, "difference to adamw"] == "–"
    assert any("baseline adamw was not run" in note for note in main.notes)


def test_seeds_that_are_as_many_and_others_are_said(tmp_path):
    adamw = [0.5, 0.51, 0.52, 0.9, 0.91, 0.92]
    for seed, score in enumerate(adamw):
        finish(tmp_path, plan("rte", "tiny", "adamw", seed), best=score)
        finish(tmp_path, plan("rte", "tiny", "sam" if seed < 3 else "dsam", seed), best=score + 0.01 * (seed + 1))
    (text,) = in_words(tables.build(collect(tmp_path)))
    assert "The methods do not share all of these pairs (dsam 3 on 1 task, sam 3 on 1 task)" in text


def test_a_difference_over_other_tasks_than_another_s_is_said(tmp_path):
    """dsam has the task alone on which everything gains: its difference is the largest, its mean there is not."""
    scores = {"rte": {"adamw": 0.61, "sam": 0.66, "dsam": 0.65}, "cola": {"adamw": 0.68, "sam": 0.66}}
    for task, of_methods in scores.items():
        for method, score in of_methods.items():
            for seed in range(3):
                finish(tmp_path, plan(task, "tiny", method, seed), best=score + 0.001 * seed * (method != "adamw"))
    notes = tables.build(collect(tmp_path)).main.notes
    (note,) = [note for note in notes if "not over the same tasks" in note]
    assert "(dsam over rte; sam over cola, rte)" in note or "(sam over cola, rte; dsam over rte)" in note
    assert any("no p can be below 0.031 to 0.25, by method, with these cells" in note for note in notes)


def test_levels_of_noise_are_said_to_be_of_one_data_set(tmp_path):
    for task in ("sst2", "sst2 noise 0.4"):
        for method in ("adamw", "sam"):
            for seed in range(3):
                run = plan("sst2", "tiny", method, seed, level=task) | {"task_label": task}
                finish(tmp_path, run, best=0.6 + 0.01 * seed * (method == "sam"), changes={"task_label": task})
    built = tables.build(collect(tmp_path))
    assert built.statistics.values.set_index("method").loc["sam", "smallest_p"] == 0.5  # seed 0 has no difference
    assert any(note.startswith("sst2: one seed's runs on several levels") for note in built.main.notes)


def test_cost_is_the_ratio_on_the_same_tasks(tmp_path):
    for task, seconds in (("rte", 0.1), ("mrpc", 1.0)):
        for seed in (0, 1, 2):
            cost = {"steps": 1, "seconds": 3600, "peak_memory_bytes": None, "examples_per_second": 1}
            # Runs beside which the machine had other work don't count.
            own = seconds * (1 if seed == 1 else 100)
            finish(
                tmp_path,
                plan(task, "tiny", "adamw", seed),
                train=cost | {"seconds_per_step": own, "passes_per_step": 1},
            )
            finish(
                tmp_path,
                plan(task, "tiny", "sam", seed),
                train=cost | {"seconds_per_step": 2 * seconds, "passes_per_step": 2},
            )
    built = tables.build(collect(tmp_path))
    seconds = built.per_task.values.set_index(["task", "method"])["seconds_per_step"]
    assert seconds.to_dict() == pytest.approx(
        {("rte", "adamw"): 0.1, ("rte", "sam"): 0.2, ("mrpc", "adamw"): 1.0, ("mrpc", "sam"): 2.0}
    )
    table = built.cost
    sam = table.values.set_index("method").loc["sam"]
    assert sam["seconds_per_step"] == pytest.approx(1.1) and sam["time_ratio"] == pytest.approx(2)
    assert sam["passes_per_step"] == 2 and sam["hours"] == 6
    assert table.text.loc[1, "peak memory (MiB)"] == "–"


def test_seconds_and_memory_of_two_machines_are_not_compared(tmp_path):
    """As many cells on each, and more runs on the GPU; sam never ran there."""
    ran = [
        ("adamw", 0, "GPU", 0.1),
        ("adamw", 2, "GPU", 0.1),
        ("adamw", 1, "CPU", 0.01),
        ("dsam", 0, "GPU", 0.3),
        ("sam", 0, "CPU", 5.0),
    ]
    for method, seed, machine, seconds in ran:
        train = {"steps": 1, "seconds": 3600, "peak_memory_bytes": seconds * 2**20, "examples_per_second": 1}
        one = plan("rte", "tiny", method, seed)
        finish(tmp_path, one, train=train | {"seconds_per_step": seconds, "passes_per_step": 2})
        (tmp_path / one["folder"] / "provenance.json").write_text(json.dumps({"device": machine}))
    built = tables.build(collect(tmp_path))
    cost = built.cost.text.set_index("method")
    assert cost["seconds per step"].to_dict() == {"adamw": "0.100", "dsam": "0.300", "sam": "–"}
    assert cost["time / adamw"].to_dict() == {"adamw": "1.00", "dsam": "3.00", "sam": "–"}
    assert cost["memory / adamw"].to_dict() == {"adamw": "1.00", "dsam": "3.00", "sam": "–"}
    assert cost["compute / adamw"].to_dict() == {"adamw": "1.00", "dsam": "1.00", "sam": "1.00"}
    assert list(cost["hours in all"]) == ["3.00", "1.00", "1.00"]
    assert list(built.per_task.text["seconds per step"]) == ["0.100", "0.300", "–"]
    for table in (built.cost, built.per_task):
        assert table.notes[-1].endswith(" Here they, and memory, are of the runs on GPU alone.")


def test_seconds_are_means_over_the_same_tasks(tmp_path):
    """adamw ran rte on the CPU: its seconds there are of mrpc alone, and so are those of the others beside it."""
    seconds = {"adamw": {"rte": 9.0, "mrpc": 1.0}, "sam": {"rte": 6.0, "mrpc": 2.0}, "dsam": {"rte": 7.0, "mrpc": 3.0}}
    for method, own in seconds.items():
        for task, spent in own.items():
            one = plan(task, "tiny", method, 0)
            train = {"steps": 1, "seconds": 1, "peak_memory_bytes": spent * 2**20, "passes_per_step": 1}
            finish(tmp_path, one, train=train | {"seconds_per_step": spent, "examples_per_second": 1})
            device = "CPU" if (method, task) == ("adamw", "rte") else "GPU"
            (tmp_path / one["folder"] / "provenance.json").write_text(json.dumps({"device": device}))
    cost = tables.build(collect(tmp_path)).cost
    text = cost.text.set_index("method")
    assert text["seconds per step"].to_dict() == {"adamw": "1.00", "sam": "2.00", "dsam": "3.00"}
    assert text["time / adamw"].to_dict() == {"adamw": "1.00", "sam": "2.00", "dsam": "3.00"}
    assert text["peak memory (MiB)"].to_dict() == {"adamw": "1.00", "sam": "2.00", "dsam": "3.00"}
    assert cost.notes[-1].endswith("of that machine: tiny mrpc.")


def test_each_model_has_a_machine_of_its_own(tmp_path):
    for model, device, spent in (("minilm", "CPU", 0.5), ("mpnet", "GPU", 0.25)):
        for method, times in (("adamw", 1), ("sam", 2)):
            one = plan("rte", model, method, 0)
            train = {"steps": 1, "seconds": 1, "peak_memory_bytes": 1, "passes_per_step": times}
            finish(tmp_path, one, train=train | {"seconds_per_step": times * spent, "examples_per_second": 1})
            (tmp_path / one["folder"] / "provenance.json").write_text(json.dumps({"device": device}))
    cost = tables.build(collect(tmp_path)).cost
    assert set(zip(cost.text["model"], cost.text["seconds per step"], strict=True)) == {
        ("minilm", "0.500"), ("minilm", "1.00"), ("mpnet", "0.250"), ("mpnet", "0.500")
    }  # fmt: skip
    assert list(cost.text["time / adamw"]) == ["1.00", "2.00"] * 2


def test_a_run_that_went_on_elsewhere_tells_no_seconds(tmp_path):
    """Neither machine's, though both are less than those of the undisturbed run."""
    for seed, device, earlier, seconds in ((0, "V100", [{"device": "H100"}], 0.004), (1, "V100", [], 0.13)):
        train = {"steps": 1, "seconds": 3600, "peak_memory_bytes": 1, "passes_per_step": 1, "examples_per_second": 1}
        one = plan("rte", "tiny", "sam", seed)
        finish(tmp_path, one, train=train | {"seconds_per_step": seconds})
        made_with = {"device": device, "earlier": earlier}
        (tmp_path / one["folder"] / "provenance.json").write_text(json.dumps(made_with))
    assert list(tables.build(collect(tmp_path)).cost.text["seconds per step"]) == ["0.130"]
    shutil.rmtree(tmp_path / one["folder"])
    cost = tables.build(collect(tmp_path)).cost
    assert list(cost.text["seconds per step"]) == ["–"] and "another machine's checkpoint" in cost.notes[-1]


def test_pairs_that_differ_in_more_than_the_method_are_said(tmp_path):
    """sam on another machine in one of three pairs, adamw and sam on several in the last, dsam from other weights."""
    for method in ("adamw", "sam", "dsam", "rdrop"):
        for seed in (0, 1, 2):
            one = plan("rte", "tiny", method, seed)
            finish(tmp_path, one, best=0.6 + 0.01 * seed)
            device = "H100" if (method, seed) == ("sam", 1) else "EPYC"
            elsewhere = [{"device": "H100"}] if seed == 2 and method in ("adamw", "sam") else []
            identity = {"data": "local rte a", "model": "sha256:b" if method == "dsam" else "sha256:a"}
            path = tmp_path / one["folder"] / "provenance.json"
            path.write_text(json.dumps({"device": device, "identity": identity, "earlier": elsewhere}))
    built = tables.build(collect(tmp_path))
    for table in (built.main, built.last_epoch, built.statistics):
        told = [note for note in table.notes if "the two runs ran" in note]
        assert [note.split(": ")[-1] for note in told] == ["dsam 1 of 3, rdrop 1 of 3, sam 2 of 3.", "dsam 3 of 3."]
        assert "on two machines" in told[0] and "two versions of the model's weights" in told[1]
    cells = built.pairwise.text.set_index("method")
    alike = {(row, column) for row, own in cells.iterrows() for column, cell in own.items() if not cell.endswith(" †")}
    own = {(method, f"− {method}") for method in cells.index}
    assert (
        alike == own
    )  # seed 1 sets sam apart, seed 2 adamw and sam, which have two machines each, and the weights dsam
    assert sum(note.startswith("†: of some of these pairs") for note in built.pairwise.notes) == 2


def test_what_differs_by_rounding_alone_is_a_tie(tmp_path):
    """Five accuracies of RTE each, with 907 of 1,385 right: their means differ in the last bit."""
    for method, right in (("adamw", (181, 179, 184, 190, 173)), ("sam", (187, 182, 180, 175, 183))):
        own = [k / 277 for k in right]
        for seed, score in enumerate(own):
            finish(tmp_path, plan("rte", "tiny", method, seed, rho=0.1), best=score)
            finish(tmp_path, plan("rte", "tiny", method, seed, rho=0.2), best=own[seed - 1])
    built = tables.build(collect(tmp_path), baseline="adamw (rho=0.1)")
    assert set(built.main.styles["rte"]) == {"bold"}
    assert set(built.statistics.text["average rank"]) == {"2.50"}
    shown = [cell.split(" [")[0] for cell in built.main.text["difference to adamw (rho=0.1)"]]
    assert set(shown) == {"–", "+0.00"}
    assert list(built.rho.styles.loc[1, ["ρ = 0.1", "ρ = 0.2"]]) == ["bold", "bold"]  # sam, beside the baseline


def test_cells_rebuild_the_means(runs_dir, tmp_path):
    built = tables.build(collect(runs_dir, "smoke"))
    tables.write(built, tmp_path / "out")
    cells = pd.read_csv(tmp_path / "out" / "cells.csv")
    means = cells.groupby(["method", "task"])["score"].mean().unstack()
    main = pd.read_csv(tmp_path / "out" / "main.csv").set_index("method")
    for task in ("rte", "mrpc"):
        np.testing.assert_allclose(means[task], main[f"{task} mean"].loc[means.index], rtol=1e-15)
    assert len(cells) == 12 and cells.loc[0, "folder"] == "rte/tiny/adamw/adamw-0"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        f"{name}.{form}"
        for name in ("main", "per_task", "statistics", "cost", "hyperparameters")
        for form in ("csv", "md", "tex", "html")
    } < names


def test_each_form_escapes_what_it_would_misread():
    text = pd.DataFrame({"method_name": [r"a&b_c 50% $x$ {y} #1 ~^\ | <b> ± -1 e-1"], "x": ["1"], "y": ["2"]})
    styles = rendering.styled([{"x": "bold", "y": "underlined"}], text)
    table = Table("t", "100 %", [], text, text, styles)
    latex = as_latex(table)
    assert r"method\_name & x & y \\" in latex and r"& \textbf{1} & \underline{2} \\" in latex
    cell = r"a\&b\_c 50\% \$x\$ \{y\} \#1 \textasciitilde{}\textasciicircum{}\textbackslash{} | $<$b$>$ $\pm$ $-$1 e-1"
    assert cell in latex and cell == escape_latex(text.iloc[0, 0])
    assert latex.count(r"\begin{tabular}{lrr}") == latex.count(r"\end{tabular}") == 1
    assert "&lt;b&gt;" in as_html(table) and "<strong>1</strong>" in as_html(table) and "<u>2</u>" in as_html(table)
    assert r"\| \<b>" in as_markdown(table) and "**1**" in as_markdown(table) and "_2_" in as_markdown(table)


@pytest.fixture(scope="module")
def built(swept):
    return tables.build(collect(swept))


def test_what_is_not_significantly_worse_than_the_best_is_underlined(built):
    main = built.main
    styles = dict(zip(main.text["method"], main.styles["rte"], strict=True))
    # Against sam (rho=0.05), t with 2 degrees of freedom: adamw 6, 4, 8 points lower (t = 6 / (2 / sqrt 3) = 5.2,
    # p = 0.018), adamw_2x 7, 5, 6 (10.4, p = 0.0046), sam (rho=0.1) 10, 9, 10 (29, p = 0.0006); the level is 0.05 / 3.
    assert styles == {"adamw": "underlined", "adamw_2x": "", "sam (rho=0.05)": "bold", "sam (rho=0.1)": ""}
    (note,) = [note for note in main.notes if note.startswith("Bold")]
    assert "paired t-test" in note and "with 3 seeds: its smallest p is 0.25" in note


def test_compute_stands_beside_the_score(built):
    main = built.main
    assert list(main.text["compute / adamw"]) == ["1.00", "2.00", "2.00", "2.00"]
    assert list(main.text.columns[:3]) == ["method", "compute / adamw", "rte"]


def test_methods_are_also_compared_at_equal_compute(built, runs_dir):
    text = built.equal_compute.text.set_index("method")["difference to adamw_2x"]
    # By hand: sam (rho=0.05) is 7, 5 and 6 points higher, adamw 1 lower, 1 higher and 0.
    assert text["sam (rho=0.05)"].startswith("+6.00 [") and text["adamw"].startswith("+0.00 [")
    assert tables.build(collect(runs_dir)).equal_compute is None


def test_methods_are_compared_on_each_task(built, tmp_path):
    """A gain on one and a loss on the other make no difference together."""
    for task, gains in (("cola", (0.01, 0.02, 0.03)), ("rte", (-0.03, -0.02, -0.01))):
        for seed, gain in enumerate(gains):
            finish(tmp_path, plan(task, "tiny", "adamw", seed), best=0.6, last=0.5)
            finish(tmp_path, plan(task, "tiny", "sam", seed), best=0.6 + gain, last=0.5 + 2 * gain)
    two = tables.build(collect(tmp_path))
    assert two.main.text.set_index("method").loc["sam", "difference to adamw"].startswith("+0.00 [")
    reach = 4.302653 * 1 / 3**0.5  # sd 1, t of 2 degrees of freedom at 97.5 %
    low, high = 2 - reach, 2 + reach
    (row,) = two.by_task.text.to_dict("records")
    assert row == {
        "method": "sam",
        "cola": f"+2.00 [{low:+.2f}, {high:+.2f}]",
        "rte": f"-2.00 [{-high:+.2f}, {-low:+.2f}]",
    }
    later = two.by_task_last_epoch.values.set_index("task")["difference"]
    assert later.round(9).to_dict() == {"cola": 0.04, "rte": -0.04}
    assert "2 intervals" in two.by_task.notes[1] and "last epoch" in two.by_task_last_epoch.caption
    assert built.by_task is None  # one task
    assert not any("left out:" in note for note in two.by_task.notes)
    for seed in range(3, 10):  # without their baseline's, which was not planned
        finish(tmp_path, plan("rte", "tiny", "sam", seed), best=0.9, last=0.9)
    finish(tmp_path, plan("cola", "tiny", "sam", 1), status="diverged")
    less = tables.build(collect(tmp_path)).by_task
    assert less.text["rte"].tolist() == two.by_task.text["rte"].tolist()
    assert less.notes[-1] == (
        "Pairs that are left out: cola seed 1: sam diverged; "
        + "; ".join(f"rte seed {seed}: adamw not planned" for seed in range(3, 8))
        + "; and 2 more."
    )


def test_runs_that_were_padded_after_all_are_said_to_be_unlike_the_others(tmp_path):
    note = "train.padding=free: PerInstance takes single examples' gradients inside the layers: batches are padded"
    for seed in (0, 1, 2):
        for method in ("adamw", "sam", "per_instance"):
            planned = plan("rte", "tiny", method, seed, padding="free", lr=1e-4)
            finish(tmp_path, planned, best=0.6 + seed / 50, **({"notes": [note]} if method == "per_instance" else {}))
    built = tables.build(collect(tmp_path))
    unlike = {(row["method"], row["other"]): row["unlike"] for _, row in built.pairwise.values.iterrows()}
    pairs = itertools.permutations(("adamw", "sam", "per_instance"), 2)
    assert unlike == {pair: "per_instance" in pair for pair in pairs}
    said = "the two runs ran with padding and without it, and so with other dropout masks: per_instance 3 of 3."
    assert any(line.endswith(said) for line in built.main.notes)
    equal, otherwise = built.hyperparameters.notes[1:]
    assert "padding free" in equal
    assert otherwise == f"Otherwise than their settings say ran per_instance (3 of 3 runs): {note}."


def test_runs_in_which_nobody_looked_at_the_labels_are_named_where_others_are_shown(tmp_path):
    fit = {
        "wrong": 0.4,
        "flipped": {"accuracy": 0.5, "loss": 0.7},
        "clean": {"accuracy": 0.9, "loss": 0.3},
        "pull": 0.6,
    }
    for method, looked in (("adamw", False), ("sam", True)):
        for seed in (0, 1):
            path = finish(tmp_path, plan("rte", "tiny", method, seed))
            result = json.loads(path.read_text())
            for point in result["evaluations"] if looked else []:
                point["memorised"] = fit
            path.write_text(json.dumps(result))
    finish(tmp_path, plan("cola", "tiny", "adamw", 0))  # of a task without wrong labels
    frame = collect(tmp_path)
    table = tables.build(frame).memorised
    assert list(table.text["method"]) == ["sam"]
    assert table.notes[-1] == "Not measured in these finished runs (their number): adamw (2)."
    (told,) = (text for name, text, _ in plots.figures(frame) if name.startswith("memorised"))
    assert told.endswith(". Not measured in these finished runs (their number): adamw (2)")


def test_a_method_of_which_all_runs_of_a_task_diverged_is_named_in_table_and_figure(tmp_path):
    for task in ("rte", "cola"):
        for seed in (0, 1, 2):
            for method in ("adamw", "sam", "asam"):
                lost = (task, method) == ("rte", "sam")
                score = 0.6 + seed / 50 + 0.01 * seed * (method != "adamw")
                finish(tmp_path, plan(task, "tiny", method, seed), score, status="diverged" if lost else "finished")
    frame = collect(tmp_path)
    lost = "; ".join(f"rte seed {seed}: sam diverged" for seed in (0, 1, 2))
    assert f"Pairs that are left out: {lost}." in tables.build(frame).by_task.notes
    told = {name: text for name, text, _ in plots.figures(frame) if "differences" in name}
    assert len(told) == 2 and all(text.endswith(f"; pairs that are left out: {lost}") for text in told.values())


def test_a_task_without_differences_is_said_to_have_none(tmp_path):
    for task, scores in (("cola", (0.1, 0.3)), ("rte", (0.2, 0.1)), ("qnli", (0.2, 0.2))):
        for seed, score in enumerate(scores):
            finish(tmp_path, plan(task, "tiny", "adamw", seed), best=0.2)
            finish(tmp_path, plan(task, "tiny", "sam", seed), best=score)
    for method in ("adamw", "sam"):
        finish(tmp_path, plan("sst2", "tiny", method, 0))
        finish(tmp_path, plan("mrpc", "tiny", method, 0), status="diverged" if method == "adamw" else "finished")
    frame = collect(tmp_path)
    table = tables.build(frame).by_task
    assert {"cola", "rte"} == set(table.text.columns) - {"method"}
    said = "mrpc (no pair with adamw); qnli (no two of its 2 pairs differ); sst2 (a single pair)"
    assert f"Without differences: {said}." in table.notes
    told = next(text for name, text, _ in plots.figures(frame) if "by_task" in name)
    assert told.endswith("; without " + said.replace("; ", ", "))


def test_pairs_with_other_wrong_labels_are_said(tmp_path):
    for method, noise in (("adamw", {}), ("sam", {"noise_seed": 1}), ("dsam", {"heldout_noise": 0.0})):
        for seed in (0, 1):
            settings = {"noise_seed": 0, "heldout_noise": 0.4} | noise
            finish(tmp_path, plan("rte", "tiny", method, seed, **settings), best=0.5 + 0.1 * seed)
    (note,) = [note for note in tables.build(collect(tmp_path)).main.notes if "wrong labels" in note]
    assert note.endswith("held-out part: dsam 2 of 2, sam 2 of 2.")


def test_every_two_methods_are_compared(built, runs_dir):
    table = built.pairwise
    text = table.text.set_index("method")
    # sam (rho=0.05) is 6, 4 and 8 points above adamw: sd 2, and t of 2 degrees of freedom at 97.5 % is 4.3027.
    reach = 4.302653 * 2 / 3**0.5
    assert text.loc["sam (rho=0.05)", "− adamw"] == f"+6.00 [+{6 - reach:.2f}, +{6 + reach:.2f}]"
    assert text.loc["adamw", "− sam (rho=0.05)"] == f"-6.00 [-{6 + reach:.2f}, -{6 - reach:.2f}]"
    assert [text.loc[method, f"− {method}"] for method in text.index] == ["–"] * 4
    values = table.values.set_index(["method", "other"])
    assert len(values) == 12 and set(values["pairs"]) == {3}
    for method in ("adamw_2x", "sam (rho=0.05)", "sam (rho=0.1)"):  # the first column is the comparison with adamw
        of_statistics = built.statistics.values.set_index("method").loc[method, ["difference", "low", "high"]]
        assert list(of_statistics) == list(values.loc[(method, "adamw"), ["difference", "low", "high"]])
    assert "6 pairs of methods" in " ".join(table.notes)
    assert tables.build(collect(runs_dir)).pairwise is None  # two methods


def test_cells_over_other_tasks_and_methods_left_out_are_said(tmp_path):
    for task, method, seeds in (("cola", "adamw", 3), ("rte", "adamw", 3), ("cola", "sam", 3), ("cola", "dsam", 3),
                                ("rte", "dsam", 3), ("cola", "asam", 1)):  # fmt: skip
        for seed in range(seeds):
            finish(tmp_path, plan(task, "tiny", method, seed), best=0.6 + 0.01 * seed)
    built = tables.build(collect(tmp_path))
    assert list(built.pairwise.text["method"]) == ["adamw", "dsam", "sam"]
    assert any("not all over the same tasks" in note for note in built.pairwise.notes)
    assert built.pairwise.notes[-1] == "Left out, with fewer than 2 seeds on every task: asam."
    assert any("not over the same tasks" in note for note in built.statistics.notes)
    even = tables.build(collect(tmp_path).query("task == 'cola' and method_label != 'asam'"))
    assert not any("same tasks" in note or "Left out" in note for note in even.pairwise.notes)


def test_methods_are_compared_at_the_last_epoch_too(built):
    values = built.pairwise_last_epoch.values
    first = built.last_epoch.values.set_index("method")["difference"].dropna()
    assert list(values[values["other"] == "adamw"].set_index("method")["difference"]) == list(first)
    assert "last epoch" in built.pairwise_last_epoch.caption


def test_the_settings_of_the_methods(built):
    table = built.hyperparameters
    assert table.text.to_dict("list") == {
        "method": ["adamw", "adamw_2x", "sam"], "steps factor": ["1", "2", "1"], "rho": ["–", "–", "0.05, 0.1"],
        "further options": ["–", "–", "mask=same"],
    }  # fmt: skip
    assert table.notes[1] == "Equal for all methods: lr 2e-05; epochs 3." and len(table.values) == 4


def test_the_rate_is_that_of_the_optimizer(tmp_path):
    for method, factor in (("adamw", {}), ("adamw_quarter_lr", {"lr_factor": 0.25}), ("sam", {"lr_factor": 1})):
        finish(tmp_path, plan(optimizer=method, lr=3e-5, **factor))
    table = tables.build(collect(tmp_path)).hyperparameters
    assert dict(zip(table.text["method"], table.text["lr"], strict=True)) == {
        "adamw": "3e-05", "adamw_quarter_lr": "7.5e-06", "sam": "3e-05"
    }  # fmt: skip
    assert list(table.values["lr"]) == [3e-5, 7.5e-6, 3e-5] and "lr_factor" not in table.values
    assert "lr factor" not in " ".join(table.notes) and "further options" not in table.text


def test_a_setting_that_follows_the_task_names_the_tasks(tmp_path):
    for task, lr in (("rte", 2e-5), ("stsb", 2e-5), ("cola", 1e-5)):
        finish(tmp_path, plan(task, optimizer="adamw", lr=lr))
        finish(tmp_path, plan(task, optimizer="sam", lr=1e-5))
    text = tables.build(collect(tmp_path)).hyperparameters.text.set_index("method")
    assert text.loc["adamw", "lr"] == "1e-05 (cola) or 2e-05 (rte, stsb)" and text.loc["sam", "lr"] == "1e-05"


def test_the_notes_say_on_which_examples_was_chosen(tmp_path):
    finish(tmp_path, plan(optimizer="adamw", selection="heldout"))
    built = tables.build(collect(tmp_path))
    assert {table.notes[0] for table in (built.main, built.per_task, built.statistics, built.hyperparameters)} == {
        "Best epoch and any settings that were picked: chosen on a split of the training set, reported on the "
        "development set."
    }
    finish(tmp_path, plan(optimizer="sam"))  # of before runs said so: the development set
    both = tables.build(collect(tmp_path)).main.notes[0]
    assert both.startswith("adamw: Best epoch and any") and "sam: Best epoch on the development set" in both


def test_scores_against_rho(built):
    table = built.rho
    assert table.text.to_dict("records") == [
        {"task": "rte", "method": "sam", "adamw": "62.00 ± 2.00 (3)", "ρ = 0.05": "68.00 ± 2.00 (3)",
         "ρ = 0.1": "58.33 ± 1.53 (3)"}
    ]  # fmt: skip
    assert list(table.styles.loc[0]) == ["", "", "", "bold", ""]
    at = table.values.set_index(["method", "rho"]).loc[("sam", 0.05)]
    reach = 4.3027 * 0.02 / 3**0.5  # the t of two degrees of freedom
    assert (at["low"], at["mean"], at["high"]) == pytest.approx((0.68 - reach, 0.68, 0.68 + reach), abs=1e-5)


def test_published_figures_stand_beside_runs_on_the_same_official_task(built):
    table = built.beside_published
    assert list(table.text.columns) == ["from", "model", "method", "rte accuracy"]
    assert list(table.text["rte accuracy"]) == ["62.00", "62.00", "68.00", "58.33", "65.70", "71.43"]
    assert list(table.text["from"]) == ["here"] * 4 + ["published [1]", "published [2]"]
    assert list(table.text["model"][4:]) == ["bert-base-cased", "bert-base-uncased"]
    assert any(
        note.startswith("[2] bert-base-uncased: median of 5 seeds") and "https://" in note for note in table.notes
    )


def test_mnli_figures_are_of_the_set_that_they_name(tmp_path):
    def point(matched, mismatched):
        metrics = {"dev_matched": {"accuracy": matched}, "dev_mismatched": {"accuracy": mismatched}}
        return {"epoch": 1, "step": 1, "score": (matched + mismatched) / 2, "metrics": metrics}

    for model in ("bert_base", "roberta_base"):
        finish(tmp_path, plan("mnli", model, "adamw"), changes={"best": point(0.84, 0.86)})
    text = tables.build(collect(tmp_path)).beside_published.text.set_index("model")
    bert = text.loc["bert_base"]
    assert (bert["mnli accuracy (matched)"], bert["mnli accuracy (mismatched)"]) == ("84.00", "86.00")
    assert text.loc["roberta_base", "mnli accuracy"] == "85.00" and text.loc["roberta-base", "mnli accuracy"] == "87.60"


def test_nothing_published_beside_other_tasks_or_a_part_of_the_data(tmp_path):
    finish(tmp_path, plan("agreement", "bert_base"))
    finish(tmp_path, plan("rte", "bert_base", max_train_examples=100))
    built = tables.build(collect(tmp_path))
    assert built.beside_published is None and built.rho is None
    own = finish(tmp_path, plan("rte", "bert_base", seed=1)).with_name("provenance.json")
    identity = {"data": "local", "model": "m", "task_settings": {}}  # a task of one's own that is called rte
    own.write_text(json.dumps({"git": {"commit": "abc"}, "device": "cpu", "identity": identity}))
    assert tables.build(collect(tmp_path)).beside_published is None
    finish(tmp_path, plan("rte", "minilm"))
    notes = tables.build(collect(tmp_path)).beside_published.notes
    assert "There are no published figures for minilm: those of other models are shown." in notes
    assert not any("nine tenths" in note for note in notes)
    finish(tmp_path, plan("rte", "minilm", "sam", selection="heldout"))
    notes = tables.build(collect(tmp_path)).beside_published.notes
    said = "Those of sam (selection=heldout) were trained on nine tenths of the training set or a little more: "
    assert said + "the rest chose their epoch." in notes


def test_latex_compiles_every_table(runs_dir, built, tmp_path):
    folder = tmp_path / "latex"
    inputs = []
    for name, made in (("smoke", tables.build(collect(runs_dir))), ("swept", built)):
        paths = tables.write(made, folder / name)
        inputs += [rf"\input{{{name}/{path.name}}}\par" for path in paths if path.suffix == ".tex"]
    assert len(inputs) == 9 + 11  # of two tasks the one, of three methods and more the other
    odd = pd.DataFrame({"δ-SAM": ["ρ² ≥ 0.5 – 50 % of a_b & c#d {e} $f ~ ^ \\ η λ ≤ 1 × 2 < 3 > -4 Σ‖∇ℓ‖"]})
    (folder / "odd.tex").write_text(as_latex(Table("odd", "δ ± ρ", ["ρ² – note %"], odd, odd)), encoding="utf-8")
    (folder / "document.tex").write_text(DOCUMENT % "\n".join([*inputs, r"\input{odd}"]), encoding="utf-8")
    done = subprocess.run([report.ROOT / "tests/latex/compile.sh", folder], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    log = (folder / "document.log").read_text(encoding="utf-8", errors="replace")
    assert "Missing character" not in log and not re.search("^!", log, re.MULTILINE)
    # LaTeX's underscore is a rule, no character.
    text = " ".join((folder / "document.txt").read_text(encoding="utf-8").split())
    for cell in ("68.00 ± 2.83 (2/3, 1 diverged)", "+12.00 [−8", "adamw 2x", "ρ = 0.05", "δ-SAM",
                 "ρ2 ≥ 0.5 – 50 % of a b & c#d {e} $f", "η λ ≤ 1 × 2 < 3 > −4"):  # fmt: skip
        assert cell in text


def test_each_published_figure_has_a_source_and_is_in_points():
    for path in sorted((report.ROOT / "results" / "reference").glob("*.csv")):
        figures = pd.read_csv(path)
        assert list(figures.columns) == ["model", "task", "metric", "value", "statistic", "source"]
        assert figures.notna().all(axis=None) and figures["value"].between(40, 100).all()
        assert not figures.duplicated(["model", "task", "metric"]).any()
        assert figures["source"].str.startswith("https://").all()


def test_rendering_writes_unix_lines(tmp_path, monkeypatch):
    """Also where a file's own lines end otherwise."""
    text, there = pd.DataFrame({"a": ["1"]}), Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda path, text, newline="\r\n", **more: there(path, text, newline=newline, **more)
    )
    for path in rendering.write(Table("t", "c", ["note"], text, text), tmp_path):
        assert b"\n" in path.read_bytes() and b"\r" not in path.read_bytes()
