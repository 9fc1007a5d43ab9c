"""Configurations: each choice composes, mistakes are named, and identity follows what computes and nothing else."""

import ast
import functools
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dsam import overrides
from dsam.config import Config
from dsam.errors import UserError
from dsam.kinds import Number, Text, Whole, Yes
from dsam.mistakes import coerced
from dsam.runs.identity import identify

CONF = ROOT / "conf"
GROUPS = {folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()}
CHOICES = [(g, c) for g, choices in GROUPS.items() if g != "experiment" for c in choices if c != "ax"]  # not trained
NEEDS = {"local": ["data.root=/data"], "encoder": ["model.path=/model"], "builtin": []}


@functools.cache
def composed(*given: str):
    return overrides.compose_config(overrides.check(list(given), CONF), CONF)


def config(*given: str) -> Config:
    return Config.load(composed(*given))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group, choice):
    loaded = config(f"{group}={choice}", *NEEDS.get(choice, []))
    assert loaded.train.lr > 0


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_composes_with_each_task_and_optimizer(experiment):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with_hydra = overrides.compose_config([f"experiment={experiment}"], CONF, with_hydra=True)
    assert with_hydra.hydra.mode.name == "MULTIRUN"
    sweeps = [f"{k}={v}" for k, v in with_hydra.hydra.sweeper.params.items()]
    given = [f"experiment={experiment}", *sweeps]  # whose recipe a sweep may go through
    assert overrides.check(given, CONF) == given
    parsed = {
        o.key_or_group: list(o.sweep_string_iterator()) if o.is_sweep_override() else [o.value()]
        for o in OverridesParser.create().parse_overrides(sweeps)
    }
    tasks, optimizers = parsed["task"], parsed["optimizer"]
    # Each task and each optimizer: an experiment's tables go by task, and none by both.
    for task, optimizer in {*((task, optimizers[0]) for task in tasks), *((tasks[-1], o) for o in optimizers)}:
        given = [f"experiment={experiment}", f"task={task}", f"optimizer={optimizer}", "data.root=/x"]
        given += ["model.path=/y", "model.architecture=null"]
        loaded = Config.load(overrides.compose_config(given, CONF))
        assert loaded.task.name == task
        assert loaded.optimizer.name == optimizer


def test_a_recipes_table_sets_each_tasks_values():
    large = config("experiment=glue_roberta_large", "task=rte")
    assert (large.train.lr, large.train.batch_size, large.train.betas) == (2e-5, 16, (0.9, 0.98))
    assert large.train.max_grad_norm is None
    assert config("experiment=glue_roberta_large", "task=qqp").train.lr == 1e-5
    assert config("experiment=glue_roberta_large", "task=qqp", "train.lr=3e-5").train.lr == 3e-5
    assert config("experiment=glue_bert_base", "task=mrpc").train.epochs == 5


def test_a_grid_gives_each_method_the_rho_of_its_own_scale():
    def rho(*given):
        return dict(config(*given).optimizer.options)["rho"]

    grid = ["experiment=label_noise", "model.path=/model", "data.root=/data"]
    found = {name: [rho(*grid, f"optimizer={name}", f"recipe.step={k}") for k in range(4)] for name in ("sam", "asam")}
    assert found == {"sam": [0.005, 0.015, 0.05, 0.15], "asam": [0.1, 0.3, 1.0, 3.0]}
    assert rho("optimizer=asam") == rho("optimizer=asam", "model.rho=0.1") == 0.5
    assert rho(*grid, "optimizer=asam", "recipe.step=1", "optimizer.rho=2") == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["optimizer=sam", "optimizer.rho=1"], ["optimizer=sam", "optimizer.rho=1.0"]),
        (["train.lr=1e-3"], ["train.lr=0.001"]),
        (["optimizer=sam"], ["optimizer=sam", "optimizer.rho=0.01"]),
        ([], ["paths.cache=/elsewhere"]),
        ([], ["tracking=disabled"]),
        ([], ["device.threads=2"]),
        ([], ["launcher.workers=2"]),
        ([], ["launcher.devices=[0]", "launcher.per_device=auto"]),
        ([], ["checkpoint.every_seconds=1"]),
        (
            ["optimizer=dsam", "optimizer.weighting=uniform"],
            ["optimizer=dsam", "optimizer.weighting=uniform", "optimizer.name=mine"],
        ),
    ],
)
def test_the_same_numbers_have_the_same_identity(one, other):
    assert identify(config(*one)).id == identify(config(*other)).id


@pytest.mark.parametrize(
    "change",
    [
        ["seed=1"],
        ["seeds.init=1"],
        ["seeds.data=1"],
        ["train.lr=3e-3"],
        ["train.max_steps=5"],
        ["train.precision=bfloat16"],
        ["optimizer=sam"],
        ["optimizer=adamw_2x"],
        ["task=entailment"],
        ["model.architecture.hidden_size=32"],
    ],
)
def test_other_numbers_have_another_identity(change):
    assert identify(config()).id != identify(config(*change)).id


def test_an_option_that_is_said_twice_is_one_thing():
    """A file in the form of a run's own config.yaml, and what is typed beside it."""
    given = config("optimizer=sam", "optimizer.rho=0.2").to_dict()
    assert given["optimizer"]["options"]["rho"] == 0.2
    same = given | {"optimizer": given["optimizer"] | {"rho": 0.2}}
    assert Config.load(same).optimizer.options["rho"] == 0.2
    other = given | {"optimizer": given["optimizer"] | {"rho": 0.1}}
    with pytest.raises(UserError, match="optimizer.rho=0.1 and optimizer.options.rho=0.2 contradict each other"):
        Config.load(other)


def test_a_weightings_options_are_part_of_the_identity():
    ids = {
        identify(config("optimizer=dsam", *more)).id
        for more in ([], ["optimizer.radius=0.3"], ["optimizer.power=0.5"], ["optimizer.weighting=gibbs"])
    }
    assert len(ids) == 4


def test_local_data_count_by_their_bytes_and_not_by_their_place(tmp_path):
    def write(name, last):
        folder = tmp_path / name / "RTE"
        folder.mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / f"{split}.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t{last}\n")
        return ["task=rte", "data=local", f"data.root={tmp_path / name}"]

    one, same, other = write("a", "entailment"), write("b", "entailment"), write("c", "not_entailment")
    assert identify(config(*one)).id == identify(config(*same)).id != identify(config(*other)).id


def test_model_folders_count_by_their_bytes(tmp_path):
    import shutil

    def model(name, weights):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        return ["model=encoder", f"model.path={folder}"]

    first = identify(config(*model("a", b"1"))).id
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert identify(config("model=encoder", f"model.path={tmp_path / 'b'}")).id == first
    assert identify(config(*model("c", b"2"))).id != first


@given(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
    )
)
@settings(max_examples=200, deadline=None)
def test_coercion_gives_the_declared_type_or_names_the_key(value):
    kinds = {Whole: int, Number: float, Yes: bool, Text: str, Whole | None: int, Number | None: float}
    for kind, wanted in kinds.items():
        try:
            found = coerced(value, kind, "some.key")
        except UserError as error:
            assert "some.key" in str(error)
            assert "\n" not in str(error).replace(repr(value), "")
        else:
            if found is not None:
                assert type(found) is wanted
                if type(found) in (int, float):
                    assert found in (value, float(value))


@pytest.mark.parametrize(
    ("typed", "place", "value"),
    [
        ("model.revision=86e12345", "model.revision", "86e12345"),
        ("model.name=1e5", "model.name", "1e5"),
        ("data.revision=007", "data.revision", "007"),
        ("model.name=1_000", "model.name", "1_000"),
        ("tracking.project=true", "tracking.project", "true"),
        ("paths.runs=/x/ü(y=z", "paths.runs", "/x/ü(y=z"),
        ("paths.runs='/x/a,b'", "paths.runs", "/x/a,b"),
        ("paths.runs=/x y/it's", "paths.runs", "/x y/it's"),
        (r"paths.runs=/a b\c (x", "paths.runs", r"/a b\c (x"),
        (r"paths.runs=/a\\b (\'", "paths.runs", r"/a\\b (\'"),
        ("paths.runs=/a (b\\", "paths.runs", "/a (b\\"),
        ("model.revision=null", "model.revision", None),
        ("data.root=~/glue", "data.root", str(Path.home() / "glue")),
        ("paths.runs='~/x'", "paths.runs", str(Path.home() / "x")),
    ],
)
def test_text_is_what_was_typed_and_folders_are_treated_alike(typed, place, value):
    found = config(typed)
    for part in place.split("."):
        found = getattr(found, part)
    assert found == value


def test_without_the_folder_of_configurations_one_line_says_what_this_is(tmp_path):
    """As in an installed wheel, which holds the library alone."""
    with pytest.raises(UserError, match="the installed package is the library alone; sweeps run from a checkout"):
        overrides.check(["task=agreement"], tmp_path / "conf")


def test_a_sweep_over_text_keeps_each_as_typed():
    (text,) = overrides.check(["model.revision=86e12345,1e5"], CONF)
    assert text == "model.revision='86e12345','1e5'"


def plain():
    given = OmegaConf.to_container(composed(), resolve=True)
    return {name: value for name, value in given.items() if name != "recipe"}


def test_a_float_in_a_file_is_no_text_and_says_so():
    given = plain() | {"model": plain()["model"] | {"revision": float("inf")}}
    with pytest.raises(UserError, match=r"'model.revision' must be text, not the number inf: put it in quotes"):
        Config.load(given)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        config().train.lr = 1.0


def test_ones_own_folder_of_configurations_lies_beside_ours(tmp_path):
    for group, name, text in (
        ("optimizer", "mysam", "name: mysam\nmethod: sam\nrho: 0.3\n"),
        ("task", "mine", "name: mine\nlabels: [a, b]\nmetrics: [accuracy]\ntext: [t]\n"
                         "files: {train: a.csv, dev: b.csv}\ntest: []\n"),
        ("experiment", "study", "# @package _global_\ntrain: {epochs: 7}\n"),
    ):  # fmt: skip
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    given = ["optimizer=mysam", "task=mine", "experiment=study", "data=local", "data.root=/x"]
    found = Config.load(overrides.compose_config(overrides.check(given, CONF, tmp_path), CONF, more=tmp_path))
    assert (found.optimizer.options["rho"], found.task.labels, found.train.epochs) == (0.3, ("a", "b"), 7)
    with pytest.raises(UserError, match="--config-dir /nowhere is not a folder"):
        overrides.own_folder("/nowhere")
    with pytest.raises(UserError, match="unknown optimizer 'mysam'"):
        overrides.check(["optimizer=mysam"], CONF)
    (tmp_path / "optimizer" / "sam.yaml").write_text("name: sam\nmethod: sam\nrho: 0.3\n")
    with pytest.raises(UserError, match="/optimizer/sam.yaml: conf/optimizer/ has one of that name; call it otherwise"):
        overrides.check(["optimizer=mysam"], CONF, tmp_path)


@pytest.mark.parametrize(
    ("others", "alike"),
    [
        (("model.rho=0.2", "seed=3", "train.lr=1e-5"), True),
        (("train.max_length=32",), False),
        (("selection=heldout",), False),
        (("device.threads=2",), False),
        (("task=similarity",), False),
    ],
)
def test_estimates_are_taken_from_runs_that_cost_the_same(others, alike):
    from dsam.sweeps.estimate import kind

    assert (kind(config("optimizer=sam")) == kind(config("optimizer=sam", *others))) == alike


@pytest.mark.parametrize(
    ("method", "options", "passes"),
    [("freelb", {"steps": 10}, 10), ("smart", {"steps": 5}, 7), ("looksam", {"k": 1}, 2), ("esam", {"gamma": 1.0}, 2),
     ("looksam", {"k": 4}, 1.25), ("sam", {}, 2), ("plain", {}, 1)],
)  # fmt: skip
def test_estimates_count_the_passes_of_a_methods_own_options(method, options, passes):
    from dsam.sweeps.estimate import passes as counted

    settings = {"name": "it", "method": method, "steps_factor": 3, **options}
    assert counted(Config.load(plain() | {"optimizer": settings})) == pytest.approx(3 * passes)


def test_conda_environment_lock_and_project_agree():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {Requirement(r).name.lower().replace("_", "-"): r for r in lines if r and not r.startswith("#")}
    assert all("==" in pin for pin in locked.values())
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    for requirement in map(Requirement, wanted):
        pin = locked[requirement.name.lower().replace("_", "-")].split("==")[1]
        assert requirement.specifier.contains(pin), requirement
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda["name"] == project["name"]
    (python,) = [d for d in conda["dependencies"] if str(d).startswith("python=")]
    assert project["requires-python"] == ">=" + python.split("=")[1]
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    assert pip == ["--requirement requirements.lock", "--editable ."]


def test_pip_takes_the_lines_that_conda_hands_to_it(tmp_path):
    """As a requirements file, which knows fewer options than pip's command."""
    from pip._internal.network.session import PipSession
    from pip._internal.req import parse_requirements

    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    handed = tmp_path / "condaenv.txt"
    handed.write_text("\n".join(pip).replace("requirements.lock", str(ROOT / "requirements.lock")))
    found = list(parse_requirements(str(handed), PipSession()))
    assert len(found) > 50 and [r.requirement for r in found if r.is_editable] == ["."]
    with pytest.raises(BaseException, match="no such option|Invalid requirement|--no-deps"):
        handed.write_text("--no-deps --editable .")
        list(parse_requirements(str(handed), PipSession()))


def test_nothing_to_the_left_imports_what_is_to_the_right():
    """When it is loaded: `config.py` asks tasks and methods within functions."""
    order = ["text", "files", "signals", "errors", "output", "cpus", "progress", "hub", "kinds", "mistakes", "task"]
    order += ["config", "overrides", "glue", "methods", "training", "runs", "sweeps"]
    order += ["results", "approximation", "sharpness", "benchmark", "submission", "integrations", "refusals"]
    order += ["command_line"]
    assert {file.stem for file in (ROOT / "dsam").glob("[!_]*") if file.name != "py.typed"} == set(order)
    found = set()
    for place, package in enumerate(order):
        for file in [*(ROOT / "dsam").glob(f"{package}.py"), *(ROOT / "dsam").glob(f"{package}/**/*.py")]:
            names = set(loaded_by(file))
            later = names.intersection(order[place + 1 :])
            assert not later, f"{file} imports {later}"
            found |= {(package, name) for name in names}
    assert {("config", "kinds"), ("benchmark", "methods"), ("results", "errors")} <= found  # of levels 1, 2 and 0


def loaded_by(file):
    """What of dsam a module imports when it is loaded, as "glue"."""
    package, left = file.relative_to(ROOT).parent.parts, ast.parse(file.read_text(encoding="utf-8")).body
    while left:
        node = left.pop()
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        yield from (name[1] for name in names if name[0] == "dsam" and len(name) > 1)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            left.extend(ast.iter_child_nodes(node))


def test_a_run_with_a_dropout_of_its_own_has_another_name_than_when_that_reached_bert_alone():
    assert "dropout_reaches" not in identify(config()).contents
    assert identify(config("train.dropout=0.1")).contents["dropout_reaches"] == "all"
