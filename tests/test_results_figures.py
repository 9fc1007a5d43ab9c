"""Figures of a synthetic sweep: what they show, and that they leave matplotlib alone."""

import matplotlib
import pandas as pd
import pytest
from conftest import ROOT
from test_results_collect import finish, plan

from dsam.results import plots
from dsam.results.collect import collect

pytestmark = pytest.mark.slow


def test_a_rho_of_0_has_its_place_on_the_axis(tmp_path):
    for rho in (0.0, 0.05, 0.1):
        for seed in range(2):
            finish(tmp_path, plan(seed=seed, rho=rho), best=0.6 + rho + 0.01 * seed)
    frame = collect(tmp_path)
    (axes,) = next(figure for name, _, figure in plots.figures(frame) if name.startswith("rho")).axes
    low, middle, high = (axes.transData.transform((rho, 0))[0] for rho in (0.0, 0.05, 0.1))
    assert high - middle > 0.1 * (high - low) and middle - low > 0.1 * (high - low)


def test_scores_are_a_point_a_run_and_a_bar_at_their_mean(runs_dir):
    figure = plots.scores(collect(runs_dir, "smoke"))
    by_hand = [
        {"adamw": [60, 62, 64], "sam": [66, 70]},
        {"adamw": [50, 80, 84], "sam": [81, 83]},
    ]
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == ["rte", "mrpc"]
    for axes, scores in zip(figure.axes, by_hand, strict=True):
        names = [tick.get_text() for tick in axes.get_xticklabels()]
        points = [line for line in axes.get_lines() if line.get_linestyle() == "None"]
        drawn = {names[round(line.get_xdata()[0])]: sorted(line.get_ydata()) for line in points}
        assert drawn == {method: pytest.approx(values) for method, values in scores.items()}
        bars = [bar for lines in axes.collections for bar in lines.get_segments()]
        ends = {names[round(bar[:, 0].mean())]: list(bar[:, 1]) for bar in bars}
        assert ends == {method: pytest.approx([sum(v) / len(v)] * 2) for method, v in scores.items()}


def test_figures_are_files_and_leave_matplotlib_alone(runs_dir, tmp_path, monkeypatch):
    before = {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
    backend = matplotlib.get_backend(auto_select=False)
    frame = collect(runs_dir, "smoke")
    drawn = list(plots.figures(frame))
    kinds = ("scores", "differences", "differences_by_task", "curves", "loss")
    assert [name for name, _, _ in drawn] == [f"{kind}_tiny" for kind in kinds]
    monkeypatch.setattr(plots, "figures", lambda *_: drawn[:1])
    png, pdf = plots.write(frame, tmp_path / "figures")
    assert (png.name, pdf.name) == ("scores_tiny.png", "scores_tiny.pdf")
    assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:4] == b"%PDF"
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
        assert drawn == {rows[m]: pytest.approx(100 * paired[m]) for m in paired.index if m != "adamw"} != {}


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
