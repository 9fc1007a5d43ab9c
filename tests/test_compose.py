"""A sweep's configurations beside Hydra's own composition of each job."""

import itertools
import random

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from dsam.config import CONF, Config
from dsam.errors import UserError
from dsam.sweeps.compose import composed, configurations

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
PLACES = ["data.root=/x", "model.path=/y", "model.architecture=null"]


@pytest.fixture
def hydra():
    """Hydra's loader of configurations."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        yield GlobalHydra.instance().hydra.config_loader
    GlobalHydra.instance().clear()


def of_hydra(loader, master, job):
    """(the configuration that Hydra makes, resolved and checked, or what is wrong with it, …)."""
    config = loader.load_sweep_config(master, job)
    experiment = config.hydra.runtime.choices.get("experiment")
    plain = OmegaConf.to_container(config, resolve=False)
    plain.pop("hydra")
    return loaded(lambda: Config.load(plain, experiment))


def loaded(load):
    try:
        return load()
    except UserError as error:
        return str(error)


def master_of(loader, given):
    return loader.load_configuration("config", given, run_mode=RunMode.MULTIRUN)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_as_hydra_has_it(hydra, experiment):
    given = [f"experiment={experiment}", *PLACES]
    master = master_of(hydra, given)
    parser = OverridesParser.create()
    swept = parser.parse_overrides([f"{k}={v}" for k, v in master.hydra.sweeper.params.items()])
    values = [
        [f"{o.key_or_group}={v}" for v in (o.sweep_string_iterator() if o.is_sweep_override() else [o.value()])]
        for o in swept
    ]
    jobs = [[*given, *job] for job in itertools.product(*values)]
    jobs = random.Random(0).sample(jobs, min(3, len(jobs))) + jobs[:2]
    made = configurations(composed(hydra, master, jobs))
    assert made == [of_hydra(hydra, master, job) for job in jobs]


def test_random_override_lists_compose_as_hydra_has_them(hydra):
    """Values and groups of all kinds, what adds and deletes among them, what is wrong among them."""
    pool = [
        *("task=rte", "task=stsb", "model=minilm", "model=tiny", "optimizer=sam", "optimizer=dsam", "optimizer=adamw"),
        *("seed=3", "seed=4", "seed=-1", "seeds.data=7", "train.lr=1e-3", "train.lr=${model.lr}", "train.epochs=2"),
        *("model.rho=0.2", "++optimizer.rho=0.3", "++optimizer.power=2", "train.betas=[0.8,0.9]", "train.dropout=null"),
        *(
            "data.label_noise=0.2",
            "launcher.workers=2",
            "device.name=cpu",
            "train.max_length='64'",
            "selection=heldout",
        ),
        *("experiment=rho_grid", "experiment=label_noise", "tracking=disabled", "+recipe.step=2", "model.id=null"),
        *("data.noise_seed=${seeds.data}", "train.max_steps=${oc.select:seed,0}", "data.label_noise=${..seed}"),
        *("optimizer.mask=fresh", "train.precision=bfloat16", "train.lr=many", "paths.runs=a b", "fresh_seeds=[8]"),
    ]
    chance = random.Random(1)
    jobs = [[*PLACES, *chance.sample(pool, chance.randint(1, 5))] for _ in range(60)]
    master, compared = master_of(hydra, PLACES), 0
    for job in jobs:
        try:
            expected = of_hydra(hydra, master, job)
        except Exception as error:  # refused by Hydra itself, and so by ours
            with pytest.raises(type(error)):
                list(composed(hydra, master, [job]))
            continue
        again = [*job, "seed=11"]
        if isinstance(expected, str):
            assert loaded(lambda job=job: configurations(composed(hydra, master, [job]))[0]) == expected, job
            continue
        other = of_hydra(hydra, master, again)
        both = loaded(lambda job=job, again=again: configurations(composed(hydra, master, [job, again])))
        assert both == (other if isinstance(other, str) else [expected, other]), job
        compared += 1
    assert compared > 15


@pytest.mark.parametrize("value", ["${seed}", "${seeds.data}", "${..seed}", "${oc.select:seed,0}"])
def test_what_refers_to_a_seed_is_resolved_for_each(hydra, value):
    given = [f"data.noise_seed={value}"]
    jobs = [[*given, f"seed={seed}"] for seed in (3, 4)]
    made = configurations(composed(hydra, master_of(hydra, given), jobs))
    assert [(c.seed, c.data.noise_seed) for c in made] == [(3, 3), (4, 4)]
