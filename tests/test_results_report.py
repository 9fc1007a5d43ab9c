"""The report of a synthetic sweep: its words, its page, and what becomes of it where something is missing."""

import json
import re
import shutil

import pytest
from test_results_collect import finish, plan, sweep

from dsam.errors import UserError
from dsam.results import plots
from dsam.results.collect import collect
from dsam.results.report import make as report
from dsam.results.report.words import in_words
from dsam.results.statistics import compare
from dsam.results.tables import build as tables

pytestmark = pytest.mark.slow


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


def test_the_words_leave_out_no_method_and_deny_no_number(tmp_path):
    """A task with a single pair takes the interval away, and neither the method nor what the test says of it."""
    whole = {task: {"adamw": [0.6] * 6, "sam": [0.7 + 0.01 * k for k in range(6)]} for task in ("rte", "mrpc")}
    text = words_of(tmp_path / "single", whole | {"stsb": {"adamw": [0.6], "sam": [0.7]}})
    assert "sam is furthest above adamw: +11.7 points, from 13 pairs" in text
    assert "these differ from adamw: sam." in text and "can be told" not in text
    figures = {name: text for name, text, _ in plots.figures(collect(tmp_path / "single"))}
    assert "differences_tiny" not in figures  # nothing has an interval there
    assert figures["differences_by_task_tiny"].endswith("with 95 % t-interval; without stsb (a single pair)")
    (tmp_path / "single/stsb/tiny/sam/sam-0/result.json").unlink()
    finish(tmp_path / "single", plan("rte", "tiny", "msam", 0), best=0.9)
    figures = {name: text for name, text, _ in plots.figures(collect(tmp_path / "single"))}
    told, lost = figures["differences_tiny"].split("; pairs that are left out: ")
    assert told.endswith("interval; none where a task has a single pair, or all are equal")
    # Of stsb one run, which is gone, and nobody knows its seed; of msam 11 cells of the two others, and stsb's.
    assert lost.startswith("stsb seed 0: sam not planned; stsb seed <NA>: sam missing; ")
    assert lost.endswith("mrpc seed 2: msam not planned; and 9 more")

    text = words_of(tmp_path / "below", {"rte": {"adamw": [0.70, 0.71, 0.72], "sam": [0.69, 0.69, 0.715]}})
    assert "no method is above adamw, the nearest is sam: -1.2 points" in text
    assert text.endswith("its p is at least 0.25.")


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


def test_no_finished_run_is_an_error_that_says_what_to_do(tmp_path):
    sweep(tmp_path / "runs", "smoke", [plan()])
    expected = r"no run of 'smoke' is finished \(1 missing\); `make reproduce` runs what is missing"
    with pytest.raises(UserError, match=expected):
        report.make("smoke", tmp_path / "runs", tmp_path / "tables", tmp_path / "figures")
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize("tables_dir, figures_dir", [("file", "figures"), ("tables", "file")])
def test_a_place_that_cannot_be_written_is_one_line(runs_dir, tmp_path, monkeypatch, tables_dir, figures_dir):
    monkeypatch.setattr(report, "_page", lambda *_: "")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file.*; set paths.tables=DIR and paths.figures=DIR"):
        report.make("smoke", runs_dir, tmp_path / tables_dir / "x", tmp_path / figures_dir / "x")


def test_the_report_is_one_file_that_needs_no_network_and_files_of_earlier_runs_are_named(runs_dir, monkeypatch):
    """The page is of the runs that the tables are of, though a run ends between the two."""
    inner = report._page

    def later(*given):
        finish(runs_dir, plan("rte", "tiny", "sam", 2), best=0.71)
        return inner(*given)

    monkeypatch.setattr(report, "_page", later)
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
