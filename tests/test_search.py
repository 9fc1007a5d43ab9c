"""Searches of settings by Optuna: beside Optuna's own loop, and through the command line."""

import json
import math
import shutil
from types import SimpleNamespace

import optuna
import pytest
from conftest import command
from hydra.core.override_parser.overrides_parser import OverridesParser

from dsam.errors import UserError
from dsam.sweeps import search
from dsam.sweeps.search import Search, is_searched
from hydra_plugins.dsam_launcher.launcher import DsamSweeper, values_of

pytestmark = pytest.mark.slow

SPACE = ["x=tag(log,interval(0.001,1.0))", "n=int(interval(1,9))", "kind=choice(a,b)"]


def parsed(*texts):
    return OverridesParser.create().parse_overrides(list(texts))


def worth(given, seed=0.0):
    """Highest at x = 0.1, n = 3, kind = b."""
    return -((math.log10(float(given["x"])) + 1) ** 2) - (int(given["n"]) - 3) ** 2 / 20 + (given["kind"] == "b") + seed


def scored(monkeypatch, of):
    """Has a search take lists of overrides for configurations, and `of` a dict of them for the score of a run."""
    monkeypatch.setattr(search, "configurations", list)
    monkeypatch.setattr(search, "plan", lambda jobs: jobs)
    monkeypatch.setattr(search, "_scored", lambda job: of(dict(text.split("=") for text in job)))


def searched(fixed=([],), seeds=([],), trials=24, at_once=1, seed=5):
    rounds = list(Search(list, parsed(*SPACE), fixed, seeds, trials, at_once, seed).rounds())
    return [[tuple(job) for job in jobs] for _, jobs in rounds]


def diverging(given):
    return -math.inf if float(given["x"]) > 0.3 else worth(given)


@pytest.mark.parametrize("of", [worth, diverging])
def test_trials_are_those_of_optunas_own_loop(monkeypatch, of):
    """An independent loop by the same sampler; the numbers that it proposes are rounded before they are scored."""
    scored(monkeypatch, of)
    found = [dict(text.split("=") for text in job) for job in searched()[-1]]

    def objective(trial):
        x = trial.suggest_float("x", 0.001, 1.0, log=True)
        n = trial.suggest_int("n", 1, 9)
        return of({"x": f"{x:.3g}", "n": n, "kind": trial.suggest_categorical("kind", ["a", "b"])})

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=5))
    study.optimize(objective, n_trials=24)
    expected = [{"x": f"{t.params['x']:.3g}", "n": str(t.params["n"]), "kind": t.params["kind"]} for t in study.trials]
    assert found == expected
    assert max(map(of, found[10:])) > max(map(of, found[:10]))  # ten are drawn, then it learns


def test_scores_are_means_over_seeds_and_each_round_adds_to_the_one_before(monkeypatch):
    scored(monkeypatch, worth)
    alone = searched(trials=12, at_once=4)
    scored(monkeypatch, lambda given: worth(given, {"1": -7.0, "2": 7.0}[given["seed"]]))
    seeds = (["seed=1"], ["seed=2"])
    found = searched(seeds=seeds, trials=12, at_once=4)
    assert [len(jobs) for jobs in found] == [8, 16, 24]
    assert all(later[: len(one)] == one for one, later in zip(found, found[1:], strict=False))
    assert [job[:-1] for job in found[-1][::2]] == [job[:-1] for job in found[-1][1::2]] == alone[-1]
    assert {job[-1] for job in found[-1][::2]} == {"seed=1"}


def test_each_combination_is_a_study_that_hears_of_no_other(monkeypatch):
    scored(monkeypatch, lambda given: worth(given) * (-1 if given.get("task") == "other" else 1))
    both = searched(fixed=(["task=one"], ["task=other"]), trials=16)[-1]
    alone = searched(fixed=(["task=other"],), trials=16)[-1]
    assert [job for job in both if job[0] == "task=other"] == alone


def test_a_diverged_run_is_the_worst(monkeypatch):
    runs = [SimpleNamespace(status="diverged"), SimpleNamespace(status="finished")]
    monkeypatch.setattr(search, "score", lambda run: 0.25)
    assert list(map(search._scored, runs)) == [-math.inf, 0.25]


@pytest.mark.parametrize("text, values", [
    ("range(0.1,0.5,0.1)", ["0.1", "0.2", "0.3", "0.4"]),
    ("range(0.01,0.12,0.03)", ["0.01", "0.04", "0.07", "0.1"]),
    ("range(0.01,0.05,0.01)", ["0.01", "0.02", "0.03", "0.04"]),
    ("range(1e-5,4e-5,1e-5)", ["1e-05", "2e-05", "3e-05"]),
    ("range(0.05,0.01,-0.01)", ["0.05", "0.04", "0.03", "0.02"]),
    ("range(0,0.9,0.3)", ["0.0", "0.3", "0.6"]),
    ("range(5,0,-1.5)", ["5.0", "3.5", "2.0", "0.5"]),
    ("range(-1,2)", ["-1", "0", "1"]),
    ("0.30000000000000004,1e-4", ["0.30000000000000004", "0.0001"]),
])  # fmt: skip
def test_a_range_has_the_numbers_that_one_would_type(text, values):
    assert values_of(parsed(f"model.rho={text}")) == [[f"model.rho={value}" for value in values]]


def test_what_is_searched():
    given = parsed(*SPACE, "a=1,2", "b=range(0,4)", "c=3", "d=int(interval(1,4))", "e=glob(*)")
    assert [o.key_or_group for o in given if is_searched(o)] == ["x", "n", "kind", "d"]
    kinds = [search.distribution(o) for o in given if is_searched(o)]
    assert [type(kind).__name__[:3] for kind in kinds] == ["Flo", "Int", "Cat", "Int"] and kinds[0].log
    with pytest.raises(UserError, match=r"^'x=interval\(3,1\)': "):
        search.distribution(parsed("x=interval(3,1)")[0])


FAST = ["-m", "task=entailment", "optimizer=sam,adamw", "model.lr=tag(log,interval(1e-4,3e-3))",
        "model.rho=tag(log,interval(0.01,0.5))", "train.max_steps=4", "train.max_train_examples=64",
        "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=2", "tracking=disabled", "launcher.workers=2"]  # fmt: skip


def folders(where):
    return {path.parent.name for path in where.glob("entailment/*/*/*/result.json")}


def test_a_search_chooses_the_best_trial_goes_on_where_it_stopped_and_reruns_with_fresh_seeds(tmp_path, paths):
    runs = tmp_path / "runs"
    given = [*FAST, "selection=heldout", "hydra.sweeper.n_trials=4", *paths]
    planned = command(*given, "launcher.plan=true")
    assert "trials 1 to 2 of 4" in planned.stdout and "4 would start" in planned.stdout, planned.stderr
    done = command(*given)
    assert done.returncode == 0, done.stderr
    trials = folders(runs)
    assert len(trials) == 8 and "8 runs: 8 finished" in done.stdout

    def best(optimizer):
        results = [json.loads(p.read_text()) for p in runs.glob(f"entailment/tiny/{optimizer}/*/result.json")]
        return max(results, key=lambda r: r["best"]["heldout_score"])

    starred = [line for line in done.stdout.splitlines() if line.startswith("* ")]
    assert [line.split()[2] for line in starred] == ["sam", "adamw"]
    for line, optimizer in zip(starred, ("sam", "adamw"), strict=True):
        score = 100 * best(optimizer)["best"]["heldout_score"]
        assert f": {score:.2f} on heldout (1/1 runs)" in line

    # One of the second round was lost (its process killed, say): it alone runs again, under the same identity.
    lost = sorted(runs.glob("entailment/tiny/sam/*/result.json"), key=lambda p: p.stat().st_mtime)[-1].parent
    shutil.rmtree(lost)
    again = command(*given, "fresh_seeds=[5]")
    assert again.returncode == 0, again.stderr
    assert "8 runs: 7 finished, 1 missing" in again.stdout and folders(runs) >= trials
    assert len(folders(runs)) == len(trials) + 2  # the chosen of each method with seed 5
    more = command(*[a.replace("n_trials=4", "n_trials=6") for a in given], "launcher.plan=true")
    assert "trials 5 to 6 of 6" in more.stdout and "12 runs: 8 finished, 4 missing" in more.stdout, more.stderr


def test_a_search_that_a_failed_run_stops_chooses_nothing(tmp_path, paths):
    done = command(*FAST, "hydra.sweeper.n_trials=2", "seed=0,104", "fresh_seeds=[5]", "launcher.retries=0", *paths,
                   before="faults:ends_of_runs")  # fmt: skip
    assert done.returncode == 1 and "a loss of patience" in done.stderr, done.stderr
    assert "* " not in done.stdout and "chosen" not in done.stdout
    assert not list((tmp_path / "runs" / ".sweeps").glob("*chosen*"))


def test_what_is_typed_takes_the_place_of_what_a_file_searches():
    """With + or without, and in its own later place. A null of the file is no text."""
    sweeper = DsamSweeper({"train.max_steps": None, "optimizer.rho": "interval(0.1,0.5)", "seed": "0,1"})
    sweeper.hydra_context = SimpleNamespace(config_loader=None)
    found = sweeper.overrides(["seed=3", "++optimizer.rho=0.05"])
    assert [o.input_line for o in found] == ["train.max_steps=null", "seed=3", "++optimizer.rho=0.05"]
    assert found[0].value() is None and not any(map(is_searched, found))


@pytest.mark.parametrize(
    "given, said",
    [
        (("-m", "model.rho=interval(0.1,0.2)"), "'model.rho=interval(0.1,0.2)': a sweep needs single values, e.g. 1,2 "
         "or range(0,3); add hydra/sweeper=optuna to search"),
        (("model.rho=interval(0.1,0.2)",), "'model.rho=interval(0.1,0.2)' is a search: add -m for a sweep"),
        (("hydra/sweeper=optuna",), "'hydra/sweeper=optuna': add -m for a sweep"),
        (("-m", "hydra/sweeper=basic"), "'hydra/sweeper=basic': the sweepers are dsam and optuna"),
        (("-m", "hydra.sweeper.n_trials=3"), "'hydra.sweeper.n_trials=3' goes with hydra/sweeper=optuna"),
        (("-m", "hydra/sweeper=optuna"), "hydra/sweeper=optuna searches interval(…) and choice(…): "
         "'model.rho=interval(0.01,0.2)'"),
        (("-m", "hydra/sweeper=optuna", "model.rho=interval(0.1,0.2)", "hydra.sweeper.n_jobs=0"),
         "hydra.sweeper.n_jobs=0 must be a whole number of at least 1"),
        (("-m", "hydra/sweeper=optuna", "model.rho=interval(0.1,0.2)", "hydra.sweeper.seed=null"),
         "hydra.sweeper.seed=None must be a whole number from 0 to 2^32 - 1"),
        (("-m", "hydra/sweeper=optuna", "model.rho=interval(0.1,0.2)", "hydra.sweeper.seed=-1"),
         "hydra.sweeper.seed=-1 must be a whole number from 0 to 2^32 - 1"),
        (("-m", "hydra/sweeper=optuna", "model.rho=interval(-2.0,0.2)"), "optimizer: rho must be at least 0, got -"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_one_line(given, said, paths):
    done = command("task=entailment", "optimizer=sam", *given, *paths)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1
