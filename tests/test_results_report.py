"""Tables, figures and the report of a synthetic sweep, against hand computation and for what a reader sees."""

import json
import re
import shutil
import subprocess

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from test_results_collect import fail, finish, plan, sweep

from dsam.errors import UserError
from dsam.results import plots
from dsam.results.collect import collect
from dsam.results.report import make as report
from dsam.results.report.words import in_words
from dsam.results.statistics import compare
from dsam.results.tables import build as tables
from dsam.results.tables import rendering
from dsam.results.tables.rendering import Table, as_html, as_latex, as_markdown, escape_latex

pytestmark = pytest.mark.slow


@pytest.fixture
def runs_dir(tmp_path):
    """adamw: rte 60, 62, 64 (one degenerate mrpc); sam: rte 66, 70 and a diverged run; mrpc seed 2 never started."""
    runs = tmp_path / "results" / "runs"
    planned = [
        plan(task, "tiny", optimizer, seed)
        for task in ("rte", "mrpc")
        for optimizer in ("adamw", "sam")
        for seed in (0, 1, 2)
    ]
    sweep(runs, "smoke", planned)
    scores = {("rte", "adamw"): (0.60, 0.62, 0.64), ("rte", "sam"): (0.66, 0.70, None)}
    scores |= {("mrpc", "adamw"): (0.80, 0.50, 0.84), ("mrpc", "sam"): (0.81, 0.83, None)}
    for run in planned:
        score = scores[run["task"], run["optimizer"]][run["seed"]]
        if score is not None:
            finish(runs, run, best=score, last=score - 0.1)
        elif run["task"] == "rte":
            finish(runs, run, best=0.99, status="diverged")
        else:
            fail(runs, run)
    return runs


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


def test_the_words_are_those_of_the_numbers(tmp_path):
    """sam is 10, 11, … points above adamw, adamw_2x about as far below as above, and nothing of another model pairs."""
    scores = {"adamw": 0.60, "sam": 0.70, "adamw_2x": 0.60}
    for task in ("rte", "mrpc"):
        for seed in range(5):
            for method, score in scores.items():
                more = {"sam": 0.01 * seed, "adamw_2x": 0.02 * (-1) ** seed, "adamw": 0.0}[method]
                train = {"steps": 1 + (method == "adamw_2x"), "passes_per_step": 2 if method == "sam" else 1}
                train |= {"seconds": 1.0, "seconds_per_step": 1.0, "examples_per_second": 1.0, "peak_memory_bytes": 1e9}
                finish(tmp_path, plan(task, "tiny", method, seed), best=score + more, train=train)
    finish(tmp_path, plan("rte", "large", "sam", 0))
    tiny, large = sorted(in_words(tables.build(collect(tmp_path))), reverse=True)
    assert large == "large: no method has runs on the same tasks and seeds as adamw."
    for method in scores:
        finish(tmp_path, plan("rte", "single", method, 0), best=scores[method])
    (single,) = [words for words in in_words(tables.build(collect(tmp_path))) if words.startswith("single")]
    assert "a single pair, or all pairs are equal: adamw_2x, sam. The sign-flip test, corrected" in single
    assert "tells none apart from adamw, and could not with so few runs: its p is at least 1." in single
    row = compare(collect(tmp_path)).set_index(["model", "method"]).loc["tiny", "sam"]
    assert tiny.startswith("tiny: over 2 tasks, sam is furthest above adamw: +12.0 points (95 % interval +")
    assert f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}), from 10 pairs of equal" in tiny
    assert (
        "at 2.00 times its compute. By their 95 % intervals, which are not corrected for 2 methods, these differ from "
        in tiny
    )
    assert "adamw: above it sam; below it none." in tiny
    assert "By the sign-flip test, corrected for 2 methods, these differ from adamw: sam." in tiny
    assert re.search(r"adamw_2x, plain training, has \+0.4 points \(.*\) at 2.00 times the compute\.$", tiny), tiny

    few = tmp_path / "few"
    for seed in range(3):
        finish(few, plan("rte", "tiny", "adamw", seed), best=0.6)
        finish(few, plan("rte", "tiny", "sam", seed), best=0.6 + 0.1 * (seed - 1))
    (text,) = in_words(tables.build(collect(few)))
    assert "No method can be told from adamw: every interval contains 0." in text
    assert text.endswith("tells none apart from adamw, and could not with so few runs: its p is at least 0.5.")


def words_of(folder, scores):
    """The words on runs with these scores, {task: {method: [seed 0's, seed 1's, …]}}."""
    for task, methods in scores.items():
        for method, of_seeds in methods.items():
            for seed, score in enumerate(of_seeds):
                finish(folder, plan(task, "tiny", method, seed), best=score)
    (text,) = in_words(tables.build(collect(folder)))
    return text


def test_the_words_leave_out_no_method_and_deny_no_number(tmp_path):
    """A task with a single pair takes the interval away, and neither the method nor what the test says of it."""
    whole = {task: {"adamw": [0.6] * 6, "sam": [0.7 + 0.01 * k for k in range(6)]} for task in ("rte", "mrpc")}
    text = words_of(tmp_path / "single", whole | {"stsb": {"adamw": [0.6], "sam": [0.7]}})
    assert "sam is furthest above adamw: +11.7 points, from 13 pairs" in text
    assert "these differ from adamw: sam." in text and "can be told" not in text
    figures = {name: text for name, text, _ in plots.figures(collect(tmp_path / "single"))}
    assert "differences_tiny" not in figures  # nothing has an interval there
    assert figures["differences_by_task_tiny"].endswith("with 95 % t-interval")
    (tmp_path / "single/stsb/tiny/sam/sam-0/result.json").unlink()
    finish(tmp_path / "single", plan("rte", "tiny", "msam", 0), best=0.9)
    figures = {name: text for name, text, _ in plots.figures(collect(tmp_path / "single"))}
    assert figures["differences_tiny"].endswith("interval; none where a task has a single pair, or all are equal")

    text = words_of(tmp_path / "below", {"rte": {"adamw": [0.70, 0.71, 0.72], "sam": [0.69, 0.69, 0.715]}})
    assert "no method is above adamw, the nearest is sam: -1.2 points" in text
    assert text.endswith("its p is at least 0.25.")


def test_other_seeds_of_each_method_are_said(tmp_path):
    """sam ran where adamw is low: its difference is the largest and its mean the least."""
    scores = {"adamw": [0.5, 0.51, 0.52, 0.9, 0.91], "dsam": [0.55, 0.56, 0.58, 0.95, 0.97], "sam": [0.6, 0.61, 0.62]}
    text = words_of(tmp_path, {"rte": scores})
    assert "do not share all of these pairs (dsam 5 on 1 task, sam 3 on 1 task)" in text
    assert "its p is at least 0.12." in text  # of dsam, which could do better than sam: 2 × 2/2^5
    notes = tables.build(collect(tmp_path)).main.notes
    assert any(note.startswith("tiny on rte: the methods do not have the same seeds.") for note in notes)
    finish(tmp_path, plan("rte", "tiny", "sam", 3), best=0.9)
    finish(tmp_path, plan("rte", "tiny", "sam", 4), best=0.9)
    assert not any("same seeds" in note for note in tables.build(collect(tmp_path)).main.notes)


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


def test_runs_that_are_lost_are_in_the_words(runs_dir):
    (text,) = in_words(tables.build(collect(runs_dir, "smoke")))
    assert text.endswith("Not in these figures: sam 1 diverged, 1 failed of 6.")


def test_a_name_that_begins_like_the_baseline_s_is_no_plain_training(tmp_path):
    train = {"steps": 1, "seconds": 1.0, "seconds_per_step": 1.0, "examples_per_second": 1.0, "peak_memory_bytes": 1e9}
    for method, passes, score in (("adamw", 1, 0.6), ("sam", 2, 0.7), ("adamw_sam", 2, 0.65), ("adamw_2x", 1, 0.62)):
        for seed in range(2):
            more = {"passes_per_step": passes}
            finish(tmp_path, plan("rte", "tiny", method, seed), best=score + seed / 100, train=train | more)
    (text,) = in_words(tables.build(collect(tmp_path)))
    assert "adamw_2x, plain training" in text and "adamw_sam, plain training" not in text


def test_levels_of_noise_are_said_to_be_of_one_data_set(tmp_path):
    for task in ("sst2", "sst2 noise 0.4"):
        for method in ("adamw", "sam"):
            for seed in range(3):
                run = plan("sst2", "tiny", method, seed, level=task) | {"task_label": task}
                finish(tmp_path, run, best=0.6 + 0.01 * seed * (method == "sam"), changes={"task_label": task})
    built = tables.build(collect(tmp_path))
    assert built.statistics.values.set_index("method").loc["sam", "smallest_p"] == 0.5  # seed 0 has no difference
    assert any(note.startswith("sst2: one seed's runs on several levels") for note in built.main.notes)


def test_a_rho_of_0_has_its_place_on_the_axis(tmp_path):
    for rho in (0.0, 0.05, 0.1):
        for seed in range(2):
            finish(tmp_path, plan(seed=seed, rho=rho), best=0.6 + rho + 0.01 * seed)
    frame = collect(tmp_path)
    (axes,) = next(figure for name, _, figure in plots.figures(frame) if name.startswith("rho")).axes
    low, middle, high = (axes.transData.transform((rho, 0))[0] for rho in (0.0, 0.05, 0.1))
    assert high - middle > 0.1 * (high - low) and middle - low > 0.1 * (high - low)


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
def swept(tmp_path_factory):
    """RTE by bert_base: adamw, adamw_2x, sam with two rho; three seeds each."""
    runs = tmp_path_factory.mktemp("swept")
    recipe = {"lr": 2e-5, "epochs": 3, "dropout": None}
    scores = {
        ("adamw", 1, 1, None): (0.60, 0.62, 0.64), ("adamw_2x", 2, 1, None): (0.61, 0.61, 0.64),
        ("sam", 1, 2, 0.05): (0.68, 0.66, 0.70), ("sam", 1, 2, 0.1): (0.58, 0.57, 0.60),
    }  # fmt: skip
    for (optimizer, factor, passes, rho), by_seed in scores.items():
        own = (
            recipe
            | {"method": "sam" if rho else "plain", "steps_factor": factor}
            | ({"rho": rho, "mask": "same"} if rho else {})
        )
        train = {"steps": 234 * factor, "seconds": 1, "seconds_per_step": passes, "passes_per_step": passes,
                 "examples_per_second": 1, "peak_memory_bytes": 1e9}  # fmt: skip
        for seed, score in enumerate(by_seed):
            run = plan("rte", "bert_base", optimizer, seed, id=f"{optimizer}-{rho}-{seed}", **own)
            finish(runs, run, best=score, train=train)
    return runs


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


def test_the_settings_of_the_methods(built):
    table = built.hyperparameters
    assert table.text.to_dict("list") == {
        "method": ["adamw", "adamw_2x", "sam"], "steps factor": ["1", "2", "1"], "rho": ["–", "–", "0.05, 0.1"],
        "further options": ["–", "–", "mask=same"],
    }  # fmt: skip
    assert table.notes[1] == "Equal for all methods: lr 2e-05; epochs 3." and len(table.values) == 4


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
    finish(tmp_path, plan("rte", "minilm"))
    notes = tables.build(collect(tmp_path)).beside_published.notes
    assert "There are no published figures for minilm: those of other models are shown." in notes
    assert not any("nine tenths" in note for note in notes)
    finish(tmp_path, plan("rte", "minilm", "sam", selection="heldout"))
    notes = tables.build(collect(tmp_path)).beside_published.notes
    said = "Those of sam (selection=heldout) were trained on nine tenths of the training set or a little more: "
    assert said + "the rest chose their epoch." in notes


DOCUMENT = r"""\documentclass{article}
\usepackage[paperwidth=60cm,margin=1cm]{geometry}
\usepackage{booktabs}
\begin{document}
%s
\end{document}
"""


def test_latex_compiles_every_table(runs_dir, built, tmp_path):
    folder = tmp_path / "latex"
    inputs = []
    for name, made in (("smoke", tables.build(collect(runs_dir))), ("swept", built)):
        paths = tables.write(made, folder / name)
        inputs += [rf"\input{{{name}/{path.name}}}\par" for path in paths if path.suffix == ".tex"]
    assert len(inputs) == 7 + 9
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


def test_figures_are_files_and_leave_matplotlib_alone(runs_dir, tmp_path):
    before = {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
    backend = matplotlib.get_backend(auto_select=False)
    paths = plots.write(collect(runs_dir, "smoke"), tmp_path / "figures")
    assert {path.name for path in paths} == {
        f"{kind}_tiny.{form}"
        for kind in ("scores", "differences", "differences_by_task", "curves", "loss")
        for form in ("png", "pdf")
    }
    assert all(path.stat().st_size > 5000 for path in paths)
    assert {name: matplotlib.rcParams[name] for name in before} == before
    assert matplotlib.get_backend(auto_select=False) == backend


def test_differences_by_task_are_each_task_s_own(runs_dir):
    frame = collect(runs_dir, "smoke")
    counted = frame[frame["status"] == "finished"]
    figure = next(drawn for name, _, drawn in plots.figures(frame) if "by_task" in name)
    assert len(figure.axes) == frame["task"].nunique() == 2
    for axes in figure.axes:
        scores = counted[counted["task"] == axes.get_title()].pivot(index="seed", columns="method_label", values="best")
        paired = scores.sub(scores["adamw"], axis=0).mean()  # by hand
        rows = {tick.get_text(): place for place, tick in enumerate(figure.axes[0].get_yticklabels())}
        drawn = {line.get_ydata()[0]: line.get_xdata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 1}
        assert drawn and all(drawn[rows[m]] == pytest.approx(100 * paired[m]) for m in rows if rows[m] in drawn)


def test_places_without_a_task_are_blank_and_each_column_has_its_numbers():
    one = pd.DataFrame({"method": ["sam"], "difference": [0.01], "low": [0.0], "high": [0.02]})
    drawn = plots.differences_by_task({f"task {k}": one for k in range(5)}, ["adamw", "sam"], "adamw")
    drawn.draw_without_rendering()
    assert [axes.axison for axes in drawn.axes] == [True] * 5 + [False] * 3
    shown = [any(t.get_visible() and t.get_text() for t in axes.get_xticklabels()) for axes in drawn.axes[:5]]
    assert shown == [False, True, True, True, True]


def test_figures_of_one_run_and_of_many_methods(tmp_path):
    finish(tmp_path, plan(), best=None)
    assert [name for name, _, _ in plots.figures(collect(tmp_path))] == ["curves_tiny", "loss_tiny"]
    for rho in range(30):
        finish(tmp_path, plan(rho=rho + 0.5))
    assert [name for name, _, _ in plots.figures(collect(tmp_path))] == [
        "scores_tiny", "curves_tiny", "loss_tiny", "rho_tiny",
    ]  # fmt: skip


def test_the_curves_by_compute_end_at_the_passes_of_a_run(swept):
    frame = collect(swept)
    assert [name for name, _, _ in plots.figures(frame)] == [
        f"{kind}_bert_base" for kind in ("scores", "differences", "curves", "compute", "loss", "rho")
    ]
    for by, sam in (("steps", 234), ("passes", 468)):
        (axes,) = plots.curves(frame, by=by).axes
        ends = {line.get_label(): line.get_xdata()[-1] for line in axes.get_lines()}
        assert ends["adamw"] == 234 and ends["sam (rho=0.05)"] == sam
    (axes,) = plots.curves(frame, by="passes", of="loss").axes
    lines = [line for line in axes.get_lines() if line.get_label() == "sam (rho=0.05)"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in lines] == [([156, 312, 468], [0.6] * 3)]
    assert axes.get_title() == "rte\n(development loss)"


@pytest.mark.parametrize("tasks", [1, 4])
def test_a_legend_stays_inside_and_leaves_the_panels_their_height(tmp_path, tasks):
    for task in ("cola", "rte", "mrpc", "sst2")[:tasks]:
        for rho in (0.005, 0.02, 0.05):
            finish(tmp_path, plan(task=task, optimizer="per_instance", rho=rho))
    frame = collect(tmp_path)
    for figure in (plots.curves(frame), plots.curves(frame, of="loss")):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        shown, whole = legend.get_window_extent(), figure.bbox
        assert whole.x0 <= shown.x0 and shown.x1 <= whole.x1 and whole.y0 <= shown.y0
        assert all(axes.get_window_extent().height / figure.dpi > 1.2 for axes in figure.axes)
        assert all(axes.get_window_extent().y0 > shown.y1 for axes in figure.axes)


def test_figures_tell_methods_apart_without_colour():
    looks = list(plots.styles([*plots.METHODS, "own", "another", "adamw (lr=1)"]).values())
    assert len({(look["marker"], look["linestyle"]) for look in looks[:7]}) == 7
    assert len({(look["color"], look["marker"], look["linestyle"]) for look in looks}) == len(looks)


def test_a_method_has_one_look_in_all_figures(tmp_path):
    shipped = {path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml")}
    assert set(plots.METHODS) == shipped
    alone = plots.styles(["dsam"])["dsam"]
    assert plots.styles(["adamw", "own", "sam", "dsam"])["dsam"] == plots.styles(["dsam", "sam"])["dsam"] == alone
    grid = plots.styles(["sam (rho=0.1)", "dsam (rho=0.1)", "dsam (rho=0.2)"])
    assert grid["dsam (rho=0.1)"] == alone
    assert grid["dsam (rho=0.2)"]["color"] == alone["color"] and grid["dsam (rho=0.2)"] != alone
    for seed in (0, 1):
        for method in ("adamw", "dsam"):
            finish(tmp_path, plan("rte", "tiny", method, seed))
    for name, _, figure in plots.figures(collect(tmp_path)):
        colours = {
            line.get_color() for axes in figure.axes for line in axes.lines if line.get_marker() == alone["marker"]
        }
        assert colours <= {alone["color"]} and (colours or name.startswith("loss")), name


def test_no_finished_run_is_an_error_that_says_what_to_do(tmp_path):
    sweep(tmp_path / "runs", "smoke", [plan()])
    with pytest.raises(UserError, match=r"no run of 'smoke' is finished \(1 missing\): run `make reproduce`"):
        report.make("smoke", tmp_path / "runs", tmp_path / "tables", tmp_path / "figures")
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize("tables_dir, figures_dir", [("file", "figures"), ("tables", "file")])
def test_a_place_that_cannot_be_written_is_one_line(runs_dir, tmp_path, monkeypatch, tables_dir, figures_dir):
    monkeypatch.setattr(report, "_page", lambda *_: "")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file.*; set paths.tables=DIR and paths.figures=DIR"):
        report.make("smoke", runs_dir, tmp_path / tables_dir / "x", tmp_path / figures_dir / "x")


def test_the_page_is_of_the_runs_that_the_tables_are_of(runs_dir, monkeypatch):
    """Though a run ends between the two."""
    inner = report._page

    def later(*given):
        finish(runs_dir, plan("rte", "tiny", "sam", 2), best=0.71)
        return inner(*given)

    monkeypatch.setattr(report, "_page", later)
    made = report.make("smoke", runs_dir, runs_dir.parent / "tables", runs_dir.parent / "figures")
    assert "68.00 ± 2.83 (2/3, 1 diverged)" in made.text
    assert "68.00 ± 2.83 (2/3, 1 diverged)" in made.html.read_text(encoding="utf-8")


def test_the_report_is_one_file_that_needs_no_network_and_files_of_earlier_runs_are_named(runs_dir):
    results = runs_dir.parent
    shutil.rmtree(runs_dir / "rte/tiny/adamw/adamw-2")
    old = [results / "tables/smoke/rho.csv", results / "figures/smoke/rho_tiny.png"]
    for path in old:
        path.parent.mkdir(parents=True)
        path.write_text("of an earlier sweep")
    made = report.make("smoke", runs_dir, results / "tables", results / "figures")
    assert made.left_over == old and all(path.exists() for path in old)
    page = made.html.read_text(encoding="utf-8")
    assert made.html == results / "report.html" and "68.00 ± 2.83 (2/3, 1 diverged)" in made.text
    assert "68.00 ± 2.83 (2/3, 1 diverged)" in page and page.count("data:image/png;base64,") == 6
    assert "<script src" not in page and "<link" not in page and not re.search(r'src="(?!data:)', page)
    assert "import" not in page and "Traceback" not in page
    assert 'href="runs/rte/tiny/sam/sam-2"' in page and "adamw, seed 2: missing" in page
    assert str(runs_dir) not in page
    assert all(path.exists() for path in made.tables + made.figures)


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(report.NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_each_published_figure_has_a_source_and_is_in_points():
    for path in sorted((report.ROOT / "results" / "reference").glob("*.csv")):
        figures = pd.read_csv(path)
        assert list(figures.columns) == ["model", "task", "metric", "value", "statistic", "source"]
        assert figures.notna().all(axis=None) and figures["value"].between(40, 100).all()
        assert not figures.duplicated(["model", "task", "metric"]).any()
        assert figures["source"].str.startswith("https://").all()


def test_rendering_writes_unix_lines(tmp_path):
    text = pd.DataFrame({"a": ["1"]})
    for path in rendering.write(Table("t", "c", ["note"], text, text), tmp_path):
        assert b"\r" not in path.read_bytes()
