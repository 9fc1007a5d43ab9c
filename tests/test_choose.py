"""Choosing on held-out examples, fresh seeds, and runs that start from another run's encoder."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command
from safetensors.torch import load_file

from dsam import command_line
from dsam.config import CONF, Config
from dsam.errors import UserError
from dsam.overrides import check, compose_config
from dsam.runs import manifest
from dsam.runs.identity import identify
from dsam.runs.record import Record
from dsam.runs.run import prepare, run
from dsam.sweeps import choose as choose_module
from dsam.sweeps import planned as planned_module
from dsam.sweeps import sweep
from dsam.sweeps.choose import choose, reseeded
from dsam.sweeps.sweep import plan as plan_of_configs
from dsam.training.batches import held_out
from dsam.training.loop import best

pytestmark = pytest.mark.slow

FAST = ["task=agreement", "model=tiny", "train.max_steps=4", "train.max_train_examples=64", "tracking=disabled"]


def config(*overrides: str) -> Config:
    return Config.load(compose_config(check([*FAST, *overrides], CONF), CONF))


@pytest.mark.parametrize("examples", [10, 2490, 67349])
def test_held_out_is_a_tenth_at_most_2000_and_apart(examples):
    train, held = held_out(examples)
    assert len(held) == min(examples // 10, 2000)
    assert sorted([*train, *held]) == list(range(examples))
    assert (held_out(examples)[1] == held).all()


def test_rows_taken_are_the_rows(paths):
    data = prepare(config(*paths)).data["train"]
    rows = np.array([5, 0, 17])
    taken = data.take(rows)
    for name, value in data.batch(rows).items():
        assert torch.equal(taken.batch(range(3))[name], value)


def test_with_heldout_nothing_held_out_is_trained_on_and_dev_is_what_is_reported(paths):
    whole = prepare(config(*paths)).data
    ready = prepare(config("selection=heldout", *paths))
    parts = [ready.data["train"], ready.data["heldout"]]
    assert sum(map(len, parts)) == len(whole["train"]) and len(ready.data["dev"]) == len(whole["dev"])
    rows = [tuple(p.input_ids[a:b]) for p in parts for a, b in zip(p.offsets, p.offsets[1:], strict=False)]
    o = whole["train"].offsets
    assert sorted(rows) == sorted(tuple(whole["train"].input_ids[a:b]) for a, b in zip(o, o[1:], strict=False))

    result = run(config("selection=heldout", "train.epochs=2", "train.max_steps=null", *paths))
    for point in result["evaluations"]:
        assert set(point["metrics"]) == {"dev", "heldout"}
        assert point["score"] == point["metrics"]["dev"]["matthews_correlation"]
        assert point["heldout_score"] == point["metrics"]["heldout"]["matthews_correlation"]
    assert result["hyperparameters"]["selection"] == "heldout"


def test_the_best_epoch_is_the_best_on_what_was_held_out():
    points = [
        {"epoch": 1, "score": 0.9, "heldout_score": 0.5},
        {"epoch": 2, "score": 0.6, "heldout_score": 0.7},
        {"epoch": 3, "score": 0.8, "heldout_score": float("nan")},
    ]
    assert best(points)["epoch"] == 2
    assert best([{k: v for k, v in p.items() if k != "heldout_score"} for p in points])["epoch"] == 1


def test_a_grid_chooses_by_hand_computed_means_and_reruns_with_fresh_seeds(tmp_path, paths):
    arguments = ["-m", *FAST, "optimizer=adamw,sam", "model.rho=0.001,0.5", "seed=range(0,2)", "selection=heldout"]
    done = command(*arguments, "fresh_seeds=[7,8]", "launcher.workers=2", *paths)
    assert done.returncode == 0, done.stderr
    sweeps = tmp_path / "runs" / ".sweeps"
    grid, chosen = (json.loads((sweeps / f"{n}.json").read_text()) for n in ("sweep", "sweep_chosen"))
    assert len(grid["runs"]) == 6  # rho is nothing to adamw: its two are one
    scores = {}
    for planned in grid["runs"]:
        result = json.loads((tmp_path / "runs" / planned["folder"] / "result.json").read_text())
        points = [e["metrics"]["heldout"]["matthews_correlation"] for e in result["evaluations"]]
        scores.setdefault((planned["optimizer"], planned["hyperparameters"].get("rho")), []).append(max(points))
    means = {rho: np.mean(values) for (optimizer, rho), values in scores.items() if optimizer == "sam"}
    winner = next(row for row in chosen["chosen"] if row["optimizer"] == "sam" and row["chosen"])
    assert winner["settings"] == {"rho": max(means, key=means.get)}
    assert winner["mean"] == pytest.approx(max(means.values()))
    again = [(r["optimizer"], r["seed"], r["hyperparameters"].get("rho")) for r in chosen["runs"]]
    rho = winner["settings"]["rho"]
    assert sorted(again, key=str) == [("adamw", 7, None), ("adamw", 8, None), ("sam", 7, rho), ("sam", 8, rho)]
    assert not {r["id"] for r in grid["runs"]} & {r["id"] for r in chosen["runs"]}
    assert chosen["chosen_of"] == sorted(r["id"] for r in grid["runs"])


@pytest.mark.parametrize(
    "words, settings",
    [
        (["weighting=gauss_newton"], [{"weighting": "gauss_newton"}, {"weighting": "probe"}]),
        (["lr_factor=0.5"], [{"lr_factor": 0.5}, {}]),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_settings_that_only_one_variant_has_are_no_obstacle(paths, words, settings, turned):
    """In either order, and each is in the settings of the variant that has it."""
    both = [[f"optimizer.{word}" for word in words], []]
    runs = plan_of_configs([config("optimizer=dsam", *own, *paths) for own in (both[::-1] if turned else both)])
    for row, expected in zip(choose(runs)[1], settings[::-1] if turned else settings, strict=True):
        assert expected.items() <= row["settings"].items()
        assert set(row["settings"]) <= {"weighting", "lr_factor", "floor", "probes", "layers", "radius"}


def test_what_nothing_can_be_chosen_of_is_said_and_an_earlier_choice_is_none_of_this(tmp_path, paths):
    """Runs that diverge are finished and have no score; first every variant of sam, then of both."""
    wild = ["train.warmup_ratio=0", "train.max_steps=30"]
    arguments = ["-m", *FAST, *wild, "optimizer=adamw,sam", "seed=0", "fresh_seeds=[7]", *paths]
    listed = tmp_path / "runs" / ".sweeps" / "sweep_chosen.json"
    for rates, lacking in (("optimizer.lr_factor=1", []), ("optimizer.lr_factor=1e33", ["adamw", "sam"])):
        done = command(*arguments, rates)
        assert done.returncode == bool(lacking), done.stderr
        said = [line for line in done.stderr.splitlines() if line.startswith("nothing chosen for")]
        assert said == [
            f"nothing chosen for agreement tiny {name}: no variant of it has all its runs finished with a score"
            for name in lacking
        ]
        assert listed.exists() == (not lacking)
        assert ("sweep_chosen was an earlier choice, and is forgotten; its runs stay" in done.stderr) == bool(lacking)


def test_a_search_that_a_failed_run_stopped_chooses_nothing_of_the_trials_before(paths, monkeypatch, capsys):
    """Of a round's two trials one is whole."""
    runs = [config("model.rho=0.1", *paths), config("model.rho=0.2", *paths)]
    monkeypatch.setattr(sweep, "work", lambda runs, *_: runs[:1])
    monkeypatch.setattr(planned_module, "unfinished", lambda runs: True)
    monkeypatch.setattr(choose_module, "choose", lambda runs: pytest.fail("chosen"))
    with pytest.raises(SystemExit) as left:
        command_line._carry_out(iter([("trials 1 and 2", runs)]))
    assert left.value.code == 1 and "the same command runs only" in capsys.readouterr().err


def test_text_that_is_not_interpolated_reaches_the_fresh_seeds(paths):
    """`\\${NAME}` in a file is `${NAME}` to the shell, and stays that."""
    composed = compose_config(check([*FAST, "launcher=slurm", *paths], CONF), CONF)
    composed.launcher.setup = [r"export TMPDIR=\${SLURM_TMPDIR}"]
    one = Config.load(composed)
    assert one.launcher.setup == ["export TMPDIR=${SLURM_TMPDIR}"]
    (again,) = reseeded([one], [7])
    assert again.launcher.setup == one.launcher.setup and again.seed == 7
    assert identify(Config.resolved(one.to_dict())) == identify(one)


def test_fresh_seeds_must_be_fresh(paths):
    done = command("-m", *FAST, "seed=range(0,2)", "fresh_seeds=[1,2]", *paths)
    assert done.returncode == 2
    assert done.stderr.strip() == ("error: fresh_seeds=[1, 2]: seed 1 is among those of the sweep, [0, 1]: name others")


def test_fresh_seeds_set_all_of_a_run_s_seeds_and_so_none_is_set_apart(paths):
    done = command("-m", *FAST, "seed=range(0,2)", "seeds.init=0", "fresh_seeds=[5,6]", *paths)
    assert done.returncode == 2 and done.stderr.strip() == (
        "error: fresh_seeds=[5, 6] set seeds.init as well, which is 0 beside seed=1 here: leave one of the two out"
    )


def test_a_child_starts_with_its_parents_encoder_and_its_own_head(tmp_path, paths):
    child = config("initialise_from=entailment", "train.lr=0", "checkpoint.keep_weights=true", *paths)
    parent = Config.load(child.parent)
    assert (parent.task.name, parent.parent, parent.train) == ("entailment", None, child.train)
    run(child)
    kept = load_file(identify(parent).folder / "best" / "model.safetensors")
    ended = load_file(identify(child).folder / "last" / "model.safetensors")
    plain = prepare(config(*paths)).network.state_dict()
    for name, value in ended.items():
        assert torch.equal(value, kept[name] if name.startswith("bert.") else plain[name]), name
    assert identify(child).id != identify(config("train.lr=0", *paths)).id
    other = config("initialise_from=entailment", "train.lr=0", "optimizer=sam", *paths)
    assert identify(Config.load(other.parent)).id != identify(parent).id


@pytest.mark.parametrize("selection, split, examples", [
    ("dev", "dev", "3 examples"),
    ("heldout", "heldout", "1 example"),
])  # fmt: skip
def test_a_choice_by_examples_of_one_label_is_said(paths, tmp_path, selection, split, examples):
    (tmp_path / "glue" / "RTE").mkdir(parents=True)
    for name, answers in (("train", ["entailment", "not_entailment"] * 9), ("dev", ["entailment"] * 3)):
        rows = [f"{i}\tA man.\tA dog.\t{answer}\n" for i, answer in enumerate(answers)]
        lines = "".join(["index\tsentence1\tsentence2\tlabel\n", *rows])
        (tmp_path / "glue" / "RTE" / f"{name}.tsv").write_text(lines)
    one = config("task=rte", "data=local", f"data.root={tmp_path / 'glue'}", f"selection={selection}", *paths)
    said = f"{split}, which chooses the epoch, has a single label ({examples}): no score there tells a better model"
    assert [note for note in prepare(one).notes if note.startswith(said)]


def test_a_child_of_a_run_that_diverged_says_so(paths):
    child = config("initialise_from=entailment", *paths)
    parent = Config.load(child.parent)
    folder, result = identify(parent).folder, run(parent)
    (folder / "result.json").unlink()
    Record(folder).finish(result | {"status": "diverged", "diverged": "step 4: gradient norm nan"})
    _, note = run(child)["notes"]
    assert note == (
        "the run that it starts from diverged (step 4: gradient norm nan): its weights of epoch "
        f"{result['best']['epoch']:g}, the best before that, were taken"
    )


def test_a_child_of_a_run_on_wrong_or_few_labels_says_so(paths, capfd):
    child = config("initialise_from=entailment", "data.label_noise=0.4", "train.max_train_examples=64", *paths)
    result = run(child)
    said = "(entailment) has 40 % of its labels wrong, 64 training examples, at most "
    assert [note for note in result["notes"] if said in note] and said in capfd.readouterr().out


def test_the_parents_recipe_is_its_own_tasks(tmp_path):
    overrides = ["experiment=glue_roberta_large_mnli", "task=rte", "data=local", f"data.root={tmp_path}"]
    child = Config.load(compose_config(overrides, CONF))
    assert (child.train.batch_size, child.train.lr) == (16, 2e-5)
    assert (child.parent["train"]["batch_size"], child.parent["train"]["lr"]) == (32, 1e-5)


def test_a_sweep_does_parents_first_and_each_once(tmp_path, paths):
    arguments = ["-m", *FAST, "task=agreement,similarity", "optimizer=adamw,sam", "initialise_from=entailment"]
    done = command(*arguments, "launcher.plan=true", "launcher.measure=true", *paths)
    said = r"^They start from 2 other runs, which are done first: 2 missing\. About [\d.]+ h of training, .* 1 worker"
    assert re.search(said, done.stdout, re.M), done.stdout + done.stderr
    done = command(*arguments, "launcher.workers=2", *paths)
    assert done.returncode == 0, done.stderr
    assert "first 2 other runs that they start from" in done.stdout
    folders = sorted(p.parent.relative_to(tmp_path / "runs") for p in tmp_path.glob("runs/*/*/*/*/result.json"))
    assert [f.parts[0] for f in folders] == ["agreement"] * 2 + ["entailment"] * 2 + ["similarity"] * 2
    assert len(json.loads((tmp_path / "runs/.sweeps/sweep.json").read_text())["runs"]) == 4


def test_a_child_without_its_parents_weights_has_them_made(tmp_path, paths):
    child = config("initialise_from=entailment", *paths)
    parent = run(Config.load(child.parent | {"checkpoint": {"keep_weights": False}}))
    run(child)
    assert run(Config.load(child.parent)) == parent
    assert (identify(Config.load(child.parent)).folder / "best" / "model.safetensors").is_file()


def test_parents_of_finished_children_are_not_trained_again(tmp_path, paths, monkeypatch, capsys):
    """Whether their weights were removed to save room, or only the children's records were unpacked."""
    child = config("initialise_from=entailment", *paths)
    run(child)
    started = []
    monkeypatch.setattr(sweep, "preflight", lambda runs: None)
    folder = identify(Config.load(child.parent)).folder
    for gone in (folder / "best", folder):
        shutil.rmtree(gone)
        assert sweep.work(sweep.plan([child]), "sweep", "", lambda runs, _: started.extend(runs) or []) == []
        assert [r.status for r in started] == ["finished"] and "first" not in capsys.readouterr().out
        command_line._show_plan(sweep.plan([child]), [child])
        assert "They start from" not in capsys.readouterr().out
        started.clear()


def test_a_parent_that_diverged_is_said_to_have(tmp_path, paths):
    """Before its first evaluation, so that it has no weights: its children do not start, and say why."""
    wild = ["train.lr=1e30", "train.warmup_ratio=0"]
    child = config("initialise_from=entailment", *wild, *paths)
    parent = Config.load(child.parent)
    assert run(parent)["status"] == "diverged"
    runs = sweep.plan([child])
    (lost,) = sweep.orphans(runs, sweep.plan([parent]))
    assert lost.status == "failed" and lost.reason.startswith("the run that it starts from diverged: entailment tiny")
    with pytest.raises(UserError, match=r"best is not there: that run diverged \(step \d+: .*\): take a lower"):
        run(child)


def test_a_choice_is_that_of_the_sweep_that_it_came_of(tmp_path, paths, capsys):
    """And not of a later one without a name."""
    given = config(*paths)
    (one,), (other,) = (sweep.plan([config(f"seed={seed}", *paths)]) for seed in (1, 2))

    def write(name, planned, *more):
        manifest.write([planned.config], [planned.identity], name, "", *more)

    runs = Path(given.paths.runs)
    write("sweep", one)
    assert manifest.chosen_from(runs, "sweep") is None
    write("sweep_chosen", one, [{"chosen": True}], [one.identity.id])
    assert manifest.chosen_from(runs, "sweep") == "sweep_chosen"
    write("sweep", other)
    assert manifest.chosen_from(runs, "sweep") is None


def test_what_cannot_be_a_parent_is_refused():
    with pytest.raises(UserError, match="initialise_from=agreement is the task itself"):
        config("initialise_from=agreement")
    with pytest.raises(UserError, match="did you mean 'entailment'"):
        config("initialise_from=entailmnt")
    with pytest.raises(UserError, match="^initialise_from=reviews: only the tasks of conf/task/ can be started from; "):
        config("initialise_from=reviews")


def test_the_grid_experiments_compose():
    for name in ("rho_grid", "glue_roberta_large_mnli"):
        assert (ROOT / "conf" / "experiment" / f"{name}.yaml").is_file()
    cfg = Config.load(compose_config(["experiment=rho_grid"], CONF))
    assert cfg.selection == "heldout" and not set(cfg.fresh_seeds) & {0, 1, 2}
