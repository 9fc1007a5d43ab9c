"""Broken configurations, data files and model folders: one line, status 2, no traceback, and nothing left behind."""

import contextlib
import functools
import gzip
import io
import json
import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import pytest
from conftest import ROOT, command
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from dsam import command_line, overrides
from dsam.command_line import CONF
from dsam.config import Config
from dsam.errors import LONGEST, UserError
from dsam.runs import identity
from dsam.runs import run as runs
from dsam.sweeps import server, sweep
from dsam.training import model as models
from dsam.training import model_files

pytestmark = pytest.mark.slow


@dataclass
class Done:
    """What a command left: its exit status, what it printed, and the files that were not there before."""

    status: int
    out: str
    err: str
    left: list[str]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """An empty folder to be in, no network, and no training: a run that would start leaves with status 0."""

    def would_start(*arguments):
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(runs, "_train", would_start)
        patch.setattr(sweep, "run_all", would_start)
        patch.setattr(server, "call", lambda function, *arguments: function(*arguments))
        patch.setattr(sys, "path", list(sys.path))
        yield Path.cwd()


def done(act) -> Done:
    """What `act` does in this process, as its own process would end."""
    identity._fingerprints.clear()
    model_files._folder_digest.cache_clear()
    before = {p for p in Path.cwd().rglob("*") if ".cache" not in p.parts}
    environment = dict(os.environ)
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            act()
        except SystemExit as leaving:
            status = leaving.code or 0
        finally:
            os.environ.clear()
            os.environ.update(environment)
    left = sorted(str(p) for p in Path.cwd().rglob("*") if ".cache" not in p.parts and p not in before)
    if status == 0:  # a folder for the run that would start
        shutil.rmtree("results", ignore_errors=True)
    return Done(status, out.getvalue(), err.getvalue(), left)


def typed(*arguments: str, script: str = "train.py") -> Done:
    """An entry point with these arguments."""

    def act():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *arguments])
            runpy.run_path(str(ROOT / "experiments" / script), run_name="__main__")

    return done(act)


@functools.cache
def composed(*given: str) -> DictConfig:
    cfg = OmegaConf.to_container(overrides.compose_config(list(given), CONF), resolve=False)
    return OmegaConf.create(cfg | {"hydra": {"runtime": {"choices": {}}}})


def run_one(*given: str) -> Done:
    """One run of a configuration that composes, without Hydra's main."""
    return done(lambda: command_line.run_one(composed(*given)))


def settled(*given: str) -> Done:
    """The same of a configuration whose settings are looked at first, as a user's are."""

    def act():
        with command_line.one_line_errors():
            cfg = composed(*overrides.check(list(given), CONF))
        command_line.run_one(cfg)

    return done(act)


def assert_one_line(found: Done, *words: str) -> None:
    assert found.status == 2, found
    assert found.err.startswith("error: ") and found.err.endswith("\n"), found.err
    assert len(found.err.splitlines()) == 1, found.err
    assert len(found.err) <= LONGEST + 20
    assert "Traceback" not in found.err and "HYDRA_FULL_ERROR" not in found.err
    assert found.left == []
    for word in words:
        assert word in found.err


LONG = "x" * 5000

MISTAKES = [
    # grammar
    ("", "''"),
    (" ", "' '"),
    ("=", "''"),
    ("=1", "''"),
    ("a", "'a'"),
    ("task", "'task'"),
    ("a b=1", "a b=1"),
    ("task=", "''"),
    ("task=[", "task=["),
    ("task={", "task={"),
    ("task='", "task='"),
    ("train.lr=[1", "train.lr=[1"),
    ("train.lr=1)", "train.lr=1)"),
    ("train.lr=(1)", "train.lr=(1)"),
    ("train.betas=[0.9,0.99]]", "train.betas"),
    ("train.lr=${", "train.lr=${"),
    ("train.lr==1", "train.lr"),
    ("tásk=agreement", "tásk"),
    ("task=é", "é"),
    ("task=agreement\nx", "\\n"),
    ("train.precision='a\nb'", "\\n"),
    ("train.precision='a\x1b[31mb'", "\\x1b"),
    ("task=\x00", "\\x00"),
    ("train.precision=\udcff", "\\udcff"),
    ("train.precision=\u2028", "\\u2028"),
    (f"task={LONG}", "xxx"),
    (f"{LONG}=1", "xxx"),
    (f"train.{LONG}=1", "train.xxx"),
    (f"train.precision={LONG}", "train.precision"),
    # groups and keys
    ("task=null", "task 'null'"),
    ("optimizer=null", "optimizer 'null'"),
    ("task=agreemen", "did you mean 'agreement'"),
    ("task=Agreement", "did you mean 'agreement'"),
    ("optimizer=[sam,adamw]", "unknown optimizer '['sam', 'adamw']'"),
    ("optimizer={a:1}", "unknown optimizer '{'a': 1}'"),
    ("experiment=../experiment/smoke", "../experiment/smoke"),
    ("task@data=agreement", "task@data"),
    ("trian.lr=1", "did you mean 'train'"),
    ("train.LR=1", "train.LR"),
    ("train.epoch=3", "did you mean 'epochs'"),
    ("optimizer=sam optimizer.roh=0.1", "did you mean 'rho'"),
    ("train.lr.x=1", "train.lr.x"),
    ("train=null", "train must be a group of settings, not None"),
    ("train=3", "train must be a group of settings, not 3"),
    ("train=[1]", "train=[1]"),
    ("~train", "'train'"),
    ("~train.lr", "'train.lr'"),
    ("~task", "'task'"),
    ("~optimizer", "'optimizer'"),
    ("~nope", "'nope'"),
    ("~train.nope", "train.nope"),
    ("+train.lr=1", "train.lr"),
    ("+train.nope=1", "train.nope"),
    ("++nope.a.b=1", "'nope'"),
    ("hydra/launcher=joblib", "hydra/launcher"),
    ("hydra=x", "hydra"),
    ("hydra.nope=1", "hydra.nope"),
    ("~hydra.run", "hydra.run"),
    ("+hydra.foo=1", "hydra.foo"),
    ("hydra.run.dir=/proc/x", "hydra.run.dir"),
    ("hydra.mode=x", "hydra.mode=x"),
    # interpolations
    ("train.lr=${nope}", "nope"),
    ("train.lr=${oc.env:NOPE_X}", "NOPE_X"),
    ("train.lr=${nope:1}", "nope"),
    ("train.lr=???", "lr"),
    ("seed=${seed}", "ecursi"),
    ("seed=${seeds.init}", "ecursi"),
    # several values without -m, and forms of Hydra's documentation
    ("task=rte,cola", "2 runs: add -m for a sweep"),
    ("paths.runs=/tmp/a,b", "one value with a comma needs quotes: \"paths.runs='/tmp/a,b'\""),
    ("+experiment=smoke", "write experiment=smoke, without the +"),
    ("-m experiment=smoke,rho_grid", "start experiment=smoke, then experiment=rho_grid"),
    ("optimizer=adamw optimizer.rho=0.1", "model.rho= sets it for each method that has one"),
    ("--foo", "unrecognized arguments: --foo; --hydra-help lists the flags"),
    # Hydra's flags
    ("--cfg job ~nope", "nope"),
    # one of each kind below, through Hydra's main
    ("train.lr=nan", "train.lr"),
    ("optimizer=sam optimizer.rho=-1", "-1"),
    ("data=local task=rte data.root=/nowhere", "/nowhere"),
    ("model.name=..", "'..'"),
    ("paths.runs=/proc/x", "/proc/x"),
    ("+model.architecture.hiden_size=3", "did you mean 'hidden_size'"),
]

VALUES = [
    ("train.lr=null", "train.lr"),
    ("train.lr=true", "train.lr"),
    ("train.lr=inf", "train.lr"),
    ("train.lr=-inf", "train.lr"),
    ("train.lr=1e400", "train.lr"),
    ("train.lr=1e39", "train.lr"),
    ("train.lr=-1e-9", "train.lr=-1e-09"),
    ("train.lr={a:1}", "train.lr"),
    ("train.epochs=0", "train.epochs=0"),
    ("train.epochs=1.5", "train.epochs"),
    ("train.epochs=true", "train.epochs"),
    ("train.epochs=1e300", "train.epochs"),
    ("train.batch_size=-1", "train.batch_size=-1"),
    ("train.batch_size=1e30", "train.batch_size"),
    ("train.micro_batch_size=0", "train.micro_batch_size=0"),
    ("train.max_steps=0", "train.max_steps=0"),
    ("train.max_length=7", "train.max_length=7"),
    ("train.max_length=129", "train.max_length=129"),
    ("train.betas=0.9", "train.betas"),
    ("train.betas=[0.9]", "train.betas"),
    ("train.betas=[0.9,a]", "train.betas[1]"),
    ("train.betas=[1,0]", "train.betas[0]=1"),
    ("train.betas={a:1,b:2}", "train.betas"),
    ("train.max_grad_norm=0", "train.max_grad_norm=0"),
    ("train.eps=0", "train.eps=0"),
    ("train.dropout=1", "train.dropout=1"),
    ("train.warmup_ratio=-0.1", "train.warmup_ratio=-0.1"),
    ("train.warmup_ratio=1", "train.warmup_ratio=1"),
    ("train.precision=16", "'16'"),
    ("seed=x", "seed"),
    ("seed=1.5", "seed"),
    ("seed=1e30", "seed"),
    ("seeds.init=9223372036854775808", "seeds.init"),
    ("seeds.data=-1", "seeds.data=-1"),
    ("seed=10000000000000", "seeds.init=10000000000000 must be below 8.79609e+12"),
    ("checkpoint.keep_weights=1", "checkpoint.keep_weights"),
    ("checkpoint.keep_weights=maybe", "maybe"),
    ("checkpoint.keep_at=5", "checkpoint.keep_at"),
    ("checkpoint.keep_at=[0]", "checkpoint.keep_at"),
    ("checkpoint.keep_at=[a]", "checkpoint.keep_at[0]"),
    ("checkpoint.every_seconds=nan", "checkpoint.every_seconds"),
    ("device.name=tpu", "'tpu'"),
    ("device.name=''", "device.name ''"),
    ("device.name=meta", "'meta'"),
    ("device.name=mps", "'mps'"),
    ("device.name=cuda:99", "cuda:99"),
    ("device.name=cuda:200", "cuda:200"),
    ("device.name=cuda:-1", "cuda:-1"),
    ("device.threads=0", "device.threads=0"),
    ("device.threads=1e12", "device.threads=1000000000000"),
    ("launcher.workers=0", "launcher.workers=0"),
    ("launcher.workers=1e12", "launcher.workers=1000000000000"),
    ("launcher.devices=0", "launcher.devices"),
    ("launcher.per_device=0", "launcher.per_device=0"),
    ("launcher.per_device=many", "'launcher.per_device' must be a whole number or auto"),
    ("launcher.minutes=0", "launcher.minutes=0"),
    ("launcher.memory_gb=nan", "launcher.memory_gb"),
    ("launcher.memory_gb=-2", "launcher.memory_gb"),
    ("launcher.devices=[]", "launcher.devices"),
    ("launcher.workers=4", "launcher.workers=4 is for sweeps: add -m"),
    ("launcher.retries=3", "launcher.retries=3 is for sweeps: add -m"),
    ("launcher.measure=true", "launcher.measure=true is of plans: add launcher.plan=true"),
    ("launcher.devices=[0]", "launcher.devices=['0'] is for sweeps: add -m"),
    ("launcher.minutes=5", "launcher.minutes=5.0 is for sweeps: add -m"),
    ("launcher.memory_gb=8", "launcher.memory_gb=8.0 is for sweeps: add -m"),
    ("fresh_seeds=[1,2]", "fresh_seeds=[1,2] come after a sweep: add -m"),
    ("launcher.devices=[0,0]", "launcher.devices"),
    ("launcher.devices=[-1]", "launcher.devices"),
    ("launcher.retries=-1", "launcher.retries=-1"),
    ("launcher.plan=maybe", "launcher.plan"),
    ("tracking.mode=x", "'x'"),
    ("tracking.project=''", "tracking.project"),
    ("tracking.project='a/b'", "a/b"),
    # methods and weightings
    ("optimizer.rho=0.1", "optimizer.rho"),
    ("optimizer.method=samm", "did you mean 'sam'"),
    ("optimizer.method=dsam", "unknown method 'dsam'; did you mean 'delta_sam'?"),
    ("optimizer.method=null", "optimizer.method"),
    ("optimizer.options=3", "optimizer.options"),
    ("optimizer.options=[1]", "optimizer.options"),
    ("optimizer.options={1:2}", "'optimizer.options': the name 1 must be text"),
    ("optimizer.steps_factor=0", "optimizer.steps_factor=0"),
    ("optimizer=sam optimizer.rho=nan", "optimizer.rho"),
    ("optimizer=sam optimizer.rho=[1,2]", "optimizer.rho"),
    ("optimizer=sam optimizer.rho=null", "optimizer.rho"),
    ("optimizer=sam optimizer.mask=other", "other"),
    ("optimizer=sam optimizer.weighting=probe", "optimizer.weighting"),
    ("optimizer=dsam optimizer.weighting=gibs", "did you mean 'gibbs'"),
    ("optimizer=dsam optimizer.weighting=[1]", "[1]"),
    ("optimizer=dsam optimizer.weighting={a:1}", "unknown weighting '{'a': 1}'"),
    ("optimizer=dsam optimizer.lam=2", "optimizer.lam"),
    ("optimizer=dsam optimizer.mix=2", "optimizer: mix cannot be 2"),
    ("optimizer=dsam optimizer.power=-1", "optimizer: power cannot be -1"),
    ("optimizer=dsam optimizer.probes=0", "probes"),
    ("optimizer=dsam optimizer.recompute=perhaps", "perhaps"),
    ("optimizer=freelb optimizer.steps=0", "optimizer: steps must be at least 1"),
    ("optimizer=m_sam optimizer.m=0", "optimizer: m must be at least 1"),
    ("optimizer=ae_sam optimizer.rho=1e39", "optimizer.rho"),
    # what does not go together, and places
    ("task=rte", "data=local"),
    ("task=ax", "task 'ax' has no training set: it is evaluated with a model trained on mnli"),
    ("task.name=../x", "../x"),
    ("data=local", "data.root"),
    ("data=hub", "data=hub"),
    ("data.root=/x", "data.root=/x is of data=local, and this is data=builtin: add data=local, or leave it out"),
    ("data.revision=0f", "data.revision=0f is of data=hub, and this is data=builtin"),
    ("data=hub task=cola data.root=/x", "data.root=/x is of data=local, and this is data=hub"),
    ("data=hub task=rte", "data=local"),
    ("data=hub task=rte data.revision=null", "data.revision"),
    ("data.source=disk", "'disk'"),
    ("data=local task=rte data.root='a\x00b'", "data.root"),
    ("data=local task=rte data.root='~nosuchuser/x'", "~nosuchuser"),
    (f"data=local task=rte data.root=/tmp/{LONG}", "data.root"),
    ("data=local task=rte data.root=/dev/null", "/dev/null"),
    ("model=minilm", "model.path"),
    ("model=encoder", "model.path"),
    (
        "model.path=/tmp",
        "model.path=/tmp: model=tiny is made from scratch, by model.architecture, and reads no weights",
    ),
    ("model.id=a/b model.revision=c", "model.id=a/b: model=tiny is made from scratch"),
    ("model=encoder model.path=/tmp +model.architecture.hidden_size=8", "and reads no weights: take model=encoder"),
    ("model=encoder model.path=''", "model.path"),
    ("model=encoder model.path=/nowhere", "/nowhere"),
    ("model=encoder model.path=/dev/null", "/dev/null"),
    ("model=encoder model.path='~nosuchuser/x'", "~nosuchuser"),
    (f"model=encoder model.path=/tmp/{LONG}", "model.path"),
    ("model=encoder model.id=a/b", "model.revision"),
    ("model.name=''", "model.name"),
    ("model.name=../../x", "../../x"),
    (f"model.name={LONG}", "model.name"),
    ("optimizer.name=a/b", "a/b"),
    ("optimizer.name='a\x00b'", "optimizer.name"),
    ("paths.runs=", "paths.runs"),
    ("paths.runs=''", "paths.runs"),
    ("paths.runs=null", "paths.runs"),
    ("paths.runs=/dev/null", "/dev/null"),
    ("paths.runs=/dev/null/x", "/dev/null"),
    ("paths.runs='a\x00b'", "paths.runs"),
    (f"paths.runs=/tmp/{LONG}", "paths.runs"),
    ("paths.cache=''", "paths.cache"),
    ("paths.cache=/dev/null", "/dev/null"),
    ("paths.cache=/proc/x", "/proc/x"),
    # architectures
    ("model.architecture=null", "model.path"),
    ("model.architecture=3", "model.architecture"),
    ("model.architecture=[1]", "model.architecture"),
    ("model.architecture={1:2,hidden_size:64}", "model.architecture"),
    ("model.architecture.hidden_size=-1", "hidden_size"),
    ("model.architecture.hidden_size=0", "hidden_size"),
    ("model.architecture.hidden_size=65", "hidden size (65) is not a multiple"),
    ("model.architecture.hidden_size=x", "hidden_size"),
    ("model.architecture.hidden_size=100000000000", "100000000000"),
    ("model.architecture.num_attention_heads=0", "num_attention_heads"),
    ("model.architecture.num_hidden_layers=null", "num_hidden_layers"),
    ("model.architecture.max_position_embeddings=8", "8 positions"),
    ("+model.architecture.num_labels=7", "num_labels"),
    ("+model.architecture.vocab_size=10", "223 tokens and the model 10 embeddings"),
    ("+model.architecture.hidden_act=foo", "foo"),
    ("+model.architecture.type_vocab_size=1", "model tiny cannot be used"),
]


def words(line: str) -> list[str]:
    """The arguments of a line above: apart at spaces before a name, as none of the values holds one."""
    parts = line.split(" ")
    return parts if line and all(p and ("=" in p or p[0] in "~-" or p == "job") for p in parts) else [line]


@pytest.mark.parametrize(("line", "word"), MISTAKES, ids=[repr(line)[1:60] for line, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_it(line, word):
    assert_one_line(typed(*words(line)), word)


@pytest.mark.parametrize(("line", "word"), VALUES, ids=[repr(line)[1:60] for line, _ in VALUES])
def test_a_value_that_cannot_be_meant_is_one_line_that_names_it(line, word):
    assert_one_line(settled(*words(line)), word)


SWEEPS = [
    ("seed=0,-1", "-1"),
    ("seed=0,x", "'x'"),
    ("seed=0,null", "seed"),
    ("seed=0,,1", "seed=0,,1"),
    ("seed=0,", "seed=0,"),
    ("seed=range(5,0)", "range(5,0)"),
    ("seed=range(0,10,0)", "range(0,10,0)"),
    ("seed=range(0,10,-1)", "range(0,10,-1)"),
    ("seed=range(a,b)", "range(a,b)"),
    ("seed=range(0,1,0.5)", "0.5"),
    ("seed=range(0,1000000000)", "100000"),
    ("seed=shuffle(range(0,1000000000))", "100000"),
    ("seed=range(0,1000) train.epochs=range(1,1000)", "100000"),
    ("seed=interval(0,1)", "interval(0,1)"),
    ("seed=glob(*)", "glob(*)"),
    ("seed=choice()", "choice()"),
    ("seed=nope(1)", "nope"),
    ("task=glob(z*)", "glob(z*)"),
    ("task=agreement,agre", "'agre'"),
    ("task=agreement,rte", "rte"),
    ("task=agreement,null", "null"),
    ("optimizer=sam,dsamm", "did you mean 'dsam'"),
    ("optimizer=sam,adamw optimizer.rho=0.1", "optimizer.rho"),
    ("optimizer=sam optimizer.rho=0.1,-1", "-1"),
    ("optimizer.options=1,2", "optimizer.options"),
    ("train.lr=1e-3,nan", "train.lr"),
    ("train.lr=1,${nope}", "nope"),
    ("train.betas=[0.9,0.99],[0.9]", "train.betas"),
    ("train.max_length=64,4096", "4096"),
    ("model=tiny,encoder", "model.path"),
    ("model=tiny,minilm", "model.path"),
    ("model.name=tiny,a/b", "a/b"),
    ("seed=0,1 model.architecture.hidden_size=65", "hidden size (65) is not a multiple"),
    ("device.name=cpu,tpu", "tpu"),
    ("device.threads=1,1e12", "device.threads"),
    ("launcher.workers=1,0", "launcher.workers=0"),
    ("launcher.workers=1,2", "launcher.workers is the whole sweep's, and here it is 1 for some runs and 2"),
    ("paths.runs=a,b", "paths.runs is the whole sweep's, and here it is a for some runs and b for others"),
    ("seed=0,1 paths.runs=runs/${seed}", "paths.runs is the whole sweep's"),
    ("launcher=slurm launcher.pack=0", "launcher.pack=0 must be at least 1"),
    ("launcher=slurm launcher.job_minutes=1", "launcher.warning_seconds=90 is all of launcher.job_minutes"),
    ("launcher=slurm launcher.partitoin=low", "did you mean 'partition'"),
    ("launcher=slurm launcher.sbatch=[qos]", "'qos' must be an option like --qos=low"),
    (
        "launcher=slurm launcher.sbatch=['--job-name=x']",
        "--job-name=x': the job's script sets --job-name itself: leave",
    ),
    ("launcher=slurm launcher.sbatch=['--cpus-per-task=2']", "sets --cpus-per-task itself: take launcher.cpus"),
    ("data=builtin,local task=agreement,rte", "data.root"),
    ("data=builtin,hub data.root=/x", "data.root=/x is of data=local, and this is data=builtin"),
    ("model.architecture.hidden_size=32,64 seed=0,1", "differ in model or data only"),
    ("seeds.data=1,2", "seeds.data is 1 and 2 for runs of one seed=0"),
    ("checkpoint.keep_at=[10],[20]", "checkpoint.keep_at is [10] and [20] for one and the same run"),
    (
        "seed=1,2 seeds.init=0 seeds.data=0 optimizer=sam",
        "tiny sam seed=1 and agreement tiny sam seed=2 have the same settings",
    ),
    ("model=tiny model.name=a,b", "agreement a adamw seed=0 and agreement b adamw seed=0 have the same settings"),
    ("train.lr=1,2 launcher.measure=true", "add launcher.plan=true"),
    ("data.noise_seed=0,1", "data.noise_seed is of label noise, and there is none: add data.label_noise="),
    ("model.revision=c", "model.revision=c is of the hub, and model=tiny reads nothing there: leave one of them out"),
    ("model=encoder model.path=/tmp model.revision=c", "model.revision=c is of the hub, and model.path=/tmp reads"),
    ("model=encoder model.path=/tmp model.id=a/b", "model.id=a/b is of the hub, and model.path=/tmp reads nothing"),
    (
        "launcher=slurm launcher.gpus=1 launcher.pack=8 launcher.workers=8 launcher.plan=true",
        "launcher.workers=8 is for jobs without GPUs: in this one launcher.per_device=N",
    ),
    (
        "launcher=slurm launcher.sbatch=['--gres=gpu:2'] launcher.workers=8 launcher.plan=true",
        "launcher.workers=8 is for jobs without GPUs",
    ),
    (
        "launcher=slurm launcher.sbatch=['--gres=tmp:10'] launcher.per_device=3 launcher.pack=3 launcher.plan=true",
        "launcher.per_device=3 is a number of runs on each GPU of a job, which has none here",
    ),
    (
        "launcher=slurm launcher.per_device=3 launcher.pack=3 launcher.plan=true",
        "launcher.per_device=3 is a number of runs on each GPU of a job, which has none here: add launcher.gpus=N",
    ),
    (
        "seed=0,1 device.name=cuda:1 launcher.devices=[0,1]",
        "cuda:1 with launcher.devices: each run sees one GPU",
    ),
    ("seed=0,1 device.name=cuda:2 launcher=slurm launcher.gpus=1", "cuda:2 with launcher.gpus: each run sees one GPU"),
    (
        f"data=hub task=boolq,cb data.revision={'0' * 40} launcher.plan=true",
        "has no effect: the file of task 'boolq' says",
    ),
    (
        "launcher.devices=[0,1] launcher.workers=4 launcher.plan=true",
        "launcher.per_device=N says how many at once on each",
    ),
    ("hydra/sweeper=optuna model.rho=interval(0.1,0.2) optimizer=sam train.epoch=3", "unknown key 'train.epoch'"),
    ("paths.runs=results/runs,/dev/null", "/dev/null"),
    ("seed=0,1 ~nope", "nope"),
    ("hydra.sweeper.max_batch_size=1 seed=0,x", "hydra.sweeper.max_batch_size"),
    ("experiment=smoke,smok", "did you mean 'smoke'"),
]


@pytest.mark.parametrize(("line", "word"), SWEEPS, ids=[line for line, _ in SWEEPS])
def test_one_bad_value_among_good_ones_starts_nothing(line, word):
    assert_one_line(typed("-m", *words(line)), word)


def test_a_plan_of_one_run_is_a_plan():
    """Without -m as well: nothing is trained, and nothing is left."""
    planned = typed("task=agreement", "launcher.plan=true")
    assert (planned.status, planned.left) == (0, []), planned.err
    assert "1 run: 1 missing. 1 would start." in planned.out


def test_a_file_of_a_sweep_is_none_of_one_run(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nhydra: {sweeper: {params: {seed: '0,1'}}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    mine = [f"--config-dir={tmp_path}", "experiment=mine", "launcher.plan=true"]
    assert_one_line(typed(*mine), "experiment=mine is a sweep, by its hydra.sweeper.params: add -m, or hydra: ")
    for one in (["-m"], ["hydra.mode=RUN"]):
        assert typed(*mine, *one).status == 0


def test_a_folder_of_ones_own_may_begin_at_home_and_its_experiments_say_that_they_set_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    file = tmp_path / "own" / "experiment" / "mine.yaml"
    for flags in (["--config-dir=~/own"], ["--config-dir", "~/own"]):
        mine = [*flags, "experiment=mine", "launcher.plan=true"]
        file.write_text("train: {epochs: 1}\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}\n")
        assert_one_line(typed(*mine), "experiment=mine sets nothing: its file must begin with the line '# @package")
        file.write_text(f"# @package _global_\n{file.read_text()}")
        assert "2 would start" in typed(*mine).out


def test_a_model_of_ones_own_need_not_say_all_and_shipped_recipes_have_a_default(tmp_path):
    (tmp_path / "model").mkdir()
    said = "name: mine\nid: me/mine\nrevision: abc\nepochs: 2\nbatch_size: 8\nlr: 1e-5\nweight_decay: 0.1\nrho: 0.05\n"
    (tmp_path / "model" / "mine.yaml").write_text(said)
    config = composed_with(tmp_path, "model=mine")
    assert (config.train.piece_overhead, config.device.threads, config.train.lr) == ("auto", None, 1e-5)
    for experiment, expected in (("glue_bert_base", (3, 32, 2e-5)), ("glue_roberta_large", (10, 16, 1e-5))):
        train = composed_with(tmp_path, f"experiment={experiment}", "task=boolq").train
        assert (train.epochs, train.batch_size, train.lr) == expected


@pytest.mark.parametrize(("text", "line", "said"), [
    ("title: mine\nname: [a\n", 3, "expected ',' or ']', but got '<stream end>'"),
    ("name: mine\ntitle: a: b\n", 2, "mapping values are not allowed here"),
    ("name: mine\nname: mine\n", 2, "found duplicate key name"),
])  # fmt: skip
def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path, text, line, said):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text(text)
    found = typed(f"--config-dir={tmp_path}", "task=mine")
    assert_one_line(found, f"error: {tmp_path}/task/mine.yaml:{line}: {said}")


def composed_with(folder, *given):
    return Config.load(overrides.compose_config(list(given), CONF, more=folder))


def test_a_commit_that_one_of_the_runs_reads_is_none_too_many():
    given = f"data=hub data.revision={'5' * 40} launcher.plan=true"
    for more in ("task=rte,boolq", "task=boolq initialise_from=mnli"):
        assert typed("-m", *words(f"{given} {more}")).status == 0


@pytest.mark.parametrize(("given", "said"), [
    (["data=hub", "task=reviews"], "data=hub needs the commit of me/reviews: data.revision=HASH, or revision: HASH "
                                   "under hub: in the file of the task 'reviews'; without it, numbers may change"),
    (["data=hub", "task=reviews", f"data.revision={'5' * 40}"], None),
    (["data=hub", "task=rte", f"data.revision={'5' * 40}"], None),
    (["data=hub", "task=boolq"], None),
])  # fmt: skip
def test_a_hub_data_set_has_one_commit_and_never_glue_s(tmp_path, given, said):
    (tmp_path / "task").mkdir()
    text = "name: reviews\nlabels: [bad, good]\nmetrics: [accuracy]\ntext: [words]\nhub: {dataset: me/reviews}\n"
    (tmp_path / "task" / "reviews.yaml").write_text(text)
    if said is None:
        assert composed_with(tmp_path, *given).data.source == "hub"
    else:
        with pytest.raises(UserError) as error:
            composed_with(tmp_path, *given)
        assert str(error.value).startswith(said)


def test_globs_choose_from_a_group():
    """With launcher.plan nothing is left, and the one task that is not built in is named."""
    assert typed("-m", "optimizer=glob(*sam)", "launcher.plan=true").out.count("missing") > 5
    assert_one_line(typed("-m", "task=glob(*te)", "launcher.plan=true"), "'rte'")


# Hydra prints these itself, over many lines, unless it is told to raise.
HYDRAS = [
    ("seed=1,2", "seed=1,2"),
    ("seed=range(0,3)", "seed=range(0,3)"),
    ("-m train.betas=[0.9,0.99],{a:1}", "train.betas"),
    ("--nope", "--nope"),
    ("--cfg=nope", "nope"),
    ("--resolve", "--resolve"),
    ("--run --multirun", "--multirun"),
    ("--config-name=nope", "nope"),
    ("--config-dir=/nowhere", "/nowhere"),
    ("--experimental-rerun=/nowhere", "rerun"),
    ("--cfg=job --resolve train.lr=${nope}", "nope"),
]


@pytest.mark.parametrize(("line", "word"), HYDRAS, ids=[line for line, _ in HYDRAS])
def test_hydras_own_errors_are_one_line(line, word):
    assert_one_line(typed(*words(line)), word)


# Any text as an override

SIGNS = "=[]{}(),:'\"\\$~+@.-/ \t\n\x00\x1bé\u2028\udcff01"
NAMES = ["task", "train", "lr", "seed", "optimizer", "sam", "agreement", "hydra"]
VALUES = ["null", "nan", "1e-3", "???", "${", "range(", "choice(", "glob(*"]
PIECES = st.sampled_from([*SIGNS, *NAMES, *VALUES])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.lists(PIECES, max_size=8).map("".join))
def test_any_text_is_settings_or_one_line(text):
    try:
        overrides.check([text], CONF)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).isprintable()


# Any value of any key


def leaves(tree: dict, path: tuple = ()):
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


COMPOSED = {
    name: OmegaConf.to_container(overrides.compose_config([f"optimizer={name}"], CONF), resolve=True)
    for name in ("adamw", "dsam", "freelb")
}
KEYS = [(name, path) for name, tree in COMPOSED.items() for path in leaves(tree) if path[0] != "recipe"]
ODD = st.one_of(
    st.sampled_from([None, True, False, [], {}, "", " ", "x", "nan", "inf", "-1", "0", "a/b", "..", "a\nb", "a\x00b"]),
    st.sampled_from(["~nobody/x", "/dev/null", "/dev/null/x", "\udcff", "x" * 300, "/tmp/" + "x" * 300, "${x}"]),
    st.sampled_from([0, -1, 2**63, 10**40, 1.5, -0.0, 1e39, 1e-320, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from([[None], [1, "a"], [[1]], {"a": 1}, {1: 2}, {"": None}]),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec="utf-8"), max_size=5),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(key=st.sampled_from(KEYS), value=ODD)
def test_any_value_of_any_key_is_planned_or_one_line(key, value):
    """A plan reads everything that is there and makes nothing."""
    name, path = key
    tree = json.loads(json.dumps(COMPOSED[name]))
    node = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    before = sorted(Path.cwd().rglob("*"))
    try:
        sweep.plan([Config.load(tree)])
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).isprintable()
    assert sorted(Path.cwd().rglob("*")) == before


# Data files

LABELLED = {
    "rte": ("RTE", ["index", "sentence1", "sentence2", "label"], ["0", "A man.", "A dog.", "entailment"]),
    "cola": ("CoLA", None, ["gj04", "1", "", "They sailed."]),
    "stsb": ("STS-B", [*"abcdefg", "sentence1", "sentence2", "score"], [*"abcdefg", "A man.", "A dog.", "3.8"]),
    "qqp": ("QQP", ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["1", "2", "3", "A?", "B?", "1"]),
}


def rows(*lines) -> bytes:
    return "".join("\t".join(line) + "\n" for line in lines if line is not None).encode()


def with_data(task: str, content: bytes | None, split: str = "train", folder: bool = False) -> Done:
    """A run whose file of that split holds `content` (None: there is none)."""
    name, header, row = LABELLED[task]
    root = Path.cwd() / ".cache" / "glue"
    shutil.rmtree(root, ignore_errors=True)
    (root / name).mkdir(parents=True)
    for each in ("train", "dev"):
        (root / name / f"{each}.tsv").write_bytes(rows(header, row, row))
    file = root / name / f"{split}.tsv"
    file.unlink()
    if folder:
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    return run_one(f"task={task}", "data=local", f"data.root={root}")


def broken(task: str) -> dict[str, bytes | None]:
    _, header, row = LABELLED[task]
    good = rows(header, row, row)
    place = row.index({"rte": "entailment", "cola": "1", "stsb": "3.8", "qqp": "1"}[task])
    place = len(row) - 1 if task == "qqp" else place
    other = [*row[:place], "maybe", *row[place + 1 :]]
    found = {
        "missing": None,
        "empty": b"",
        "blank lines": b"\n\n\n",
        "a mark alone": b"\xef\xbb\xbf",
        "gzip": gzip.compress(good),
        "UTF-16": good.decode().encode("utf-16"),
        "broken UTF-8": good + b"\xff\n",
        "a field more": good + rows([*row, "x"]),
        "unknown label": good + rows(other),
        "commas": good.replace(b"\t", b","),
        "NUL bytes": b"\x00" * 100,
        "a page": b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
    }
    if header:
        found |= {
            "header alone": rows(header),
            "no header": rows(row, row),
            "a column less": rows(header[:-1], row[:-1]),
            "other columns": rows([f"x{i}" for i in range(len(header))], row),
            "a column twice": rows([*header[:-2], header[-1], header[-1]], row),
            "header twice": rows(header, header, row),
        }
    if task != "qqp":  # whose own files hold a few
        found |= {"cut off": good[: -len(rows(row[1:]))], "a blank line": good + b"\n" + rows(row)}
    if task == "stsb":
        for score in ("nan", "inf", "-0.1", "5.01", "", "3,8"):
            found[f"score {score}"] = good + rows([*row[:-1], score])
    return found


# What a message says beside the file's name; a row's place where the fault is in one.
NAMED = {
    "empty": ["empty"],
    "header alone": ["no rows"],
    "a column less": ["columns"],
    "unknown label": [":4", "maybe"],
    "broken UTF-8": [":4", "UTF-8"],
}
NAMED |= {"a field more": [":4"]}

FILES = [(task, split, what) for task in LABELLED for split in ("train", "dev") for what in broken(task)]


@pytest.mark.parametrize(("task", "split", "what"), FILES)
def test_a_broken_data_file_is_named(task, split, what):
    words = [] if task == "cola" else NAMED.get(what, [])  # that has no header, and its rows count from 1
    assert_one_line(with_data(task, broken(task)[what], split), f"{LABELLED[task][0]}/{split}.tsv", *words)


def test_a_folder_in_place_of_a_data_file_is_named():
    assert_one_line(with_data("rte", None, "dev", folder=True), "RTE/dev.tsv")


@pytest.mark.parametrize(
    "change",
    [
        lambda good: b"\xef\xbb\xbf" + good,
        lambda good: good.replace(b"\n", b"\r\n"),
        lambda good: good.removesuffix(b"\n"),
        lambda good: good + b"\n\n",
        lambda good: good.replace(b"A man.", b'"A "" man.'),
        lambda good: good.replace(b"A man.", b""),
        lambda good: good.replace(b"A man.", b"x " * 10_000),
    ],
)
def test_what_real_files_hold_is_no_mistake(change):
    _, header, row = LABELLED["rte"]
    assert with_data("rte", change(rows(header, row, row))).status == 0


BYTES = st.sampled_from(
    [b"\t", b"\n", b"\r", b'"', b"\x00", b"\xff", b"\xef\xbb\xbf", b"1", b"nan", b"entailment", b""]
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(task=st.sampled_from(list(LABELLED)), at=st.integers(0, 60), cut=st.integers(0, 30), new=st.lists(BYTES))
def test_a_damaged_data_file_is_read_or_named(task, at, cut, new):
    name, header, row = LABELLED[task]
    good = rows(header, row, row)
    found = with_data(task, good[:at] + b"".join(new) + good[at + cut :])
    if found.status:
        assert_one_line(found, f"{name}/train.tsv")


# Model folders


@pytest.fixture(scope="module")
def model_folder(place):
    """A whole one: the tiny model."""
    folder = place / ".cache" / "whole"
    config = Config.load(overrides.compose_config([], CONF))
    tokenizer = models.load_tokenizer(config.model)
    models.build(config, 2, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_model(whole: Path, spoil) -> Done:
    folder = whole.with_name("spoilt")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    spoil(folder)
    return run_one("model=encoder", f"model.path={folder}")


def edit(**changes):
    def spoil(folder: Path):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def cut(name: str, share: float):
    return lambda folder: os.truncate(folder / name, int(share * (folder / name).stat().st_size))


def put(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def folder_for_file(name: str):
    def spoil(folder: Path):
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def shrink(folder: Path):
    """A whole model, with fewer embeddings than its tokenizer has tokens."""
    weights = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    weights[name] = weights[name][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(vocab_size=100)(folder)


def code_of_its_own(folder: Path):
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')")
    edit(model_type="evil", auto_map={"AutoConfig": "evil.Config"})(folder)


NAMES = ("config.json", "model.safetensors", "tokenizer.json")
SPOILS = {
    **{f"without {name}": lambda folder, name=name: (folder / name).unlink() for name in NAMES},
    **{f"{name} is a folder": folder_for_file(name) for name in NAMES},
    **{f"{name} {int(100 * share)} %": cut(name, share) for name in NAMES for share in (0, 0.01, 0.5, 0.99)},
    **{f"{name} holds {text!r}": put(name, text) for name in NAMES for text in ("null", "[]", "{}", "3", "broken")},
    "fewer embeddings": edit(vocab_size=10),
    "more embeddings": edit(vocab_size=10_000),
    "another size": edit(hidden_size=32),
    "sizes that do not fit": edit(hidden_size=65),
    "more layers": edit(num_hidden_layers=3),
    "no layers": edit(num_hidden_layers=-1),
    "text for a number": edit(hidden_size="big"),
    "null for a number": edit(num_attention_heads=None),
    "one token type": edit(type_vocab_size=1),
    "few positions": edit(max_position_embeddings=16),
    "unknown activation": edit(hidden_act="nope"),
    "unknown kind": edit(model_type="nope"),
    "a model of images": edit(model_type="vit"),
    "fewer embeddings than tokens": shrink,
    "no tokenizer at all": lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "vocab.txt")
                                           if (folder / name).exists()],
    "code of its own": code_of_its_own,
    "a file that cannot be read": lambda folder: (folder / "training_args.bin").symlink_to("/proc/self/mem"),
}  # fmt: skip
# What a message says beside the folder.
MISSING = {
    "without model.safetensors": ["no weights", "model.safetensors"],
    "without config.json": ["no configuration"],
    "no tokenizer at all": ["no tokenizer"],
    "a file that cannot be read": ["training_args.bin cannot be read: Input/output error"],
    "config.json holds 'broken'": ["config.json"],
    "model.safetensors holds 'broken'": ["weights"],
    "tokenizer.json holds '{}'": ["tokenizer"],
    "another size": ["do not fit"],
    "more layers": ["do not fit", "missing"],
    "fewer embeddings than tokens": ["tokenizer", "embeddings"],
}


@pytest.mark.parametrize("what", SPOILS)
def test_a_broken_model_folder_is_named(model_folder, what):
    assert_one_line(with_model(model_folder, SPOILS[what]), "spoilt", *MISSING.get(what, []))
    assert not (model_folder.parent / "ran").exists()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=st.sampled_from(NAMES), share=st.floats(0, 1), new=st.binary(min_size=1, max_size=20))
def test_a_damaged_model_folder_is_used_or_named(model_folder, name, share, new):
    def spoil(folder: Path):
        data = (folder / name).read_bytes()
        at = int(share * len(data))
        (folder / name).write_bytes(data[:at] + new + data[at + len(new) :])

    found = with_model(model_folder, spoil)
    if found.status:
        assert_one_line(found, "spoilt")


# The other entry points, and a few of each as a user types them


OTHERS = [
    ("paper.py", "experiment=smok", "did you mean 'smoke'"),
    ("paper.py", "paths.runs=", "no sweep"),
    ("paper.py", "nope=1", "nope"),
    ("paper.py", "task=", "''"),
    ("paper.py", "experiment=[", "experiment=["),
    ("paper.py", "experiment=smoke paths.runs=/nowhere", "make reproduce"),
    ("verify.py", "experiment=smok", "did you mean 'smoke'"),
    ("verify.py", "--rerun -1", "--rerun"),
    ("verify.py", "--nope", "--nope"),
    ("verify.py", "paths.tables=/nowhere", "make paper"),
    ("approximation.py", "--batches 0", "batches and batch size must be at least 1"),
    ("approximation.py", "--rho -1", "every rho above 0"),
    ("approximation.py", "--tasks agreemen", "agreemen"),
    ("approximation.py", "--model-path /nowhere", "/nowhere"),
    ("approximation.py", "--tasks rte --data-root /nowhere", "/nowhere"),
    ("approximation.py", "--tasks agreement -- train.lr=nan", "train.lr"),
    ("sharpness.py", "/nowhere", "/nowhere"),
    ("sharpness.py", "", "the following arguments are required: run"),
    ("sharpness.py", "/nowhere --rho nan", "--rho"),
    ("sharpness.py", "/nowhere --nope", "--nope"),
    ("sharpness.py", "/nowhere --examples 0", "--examples"),
]


@pytest.mark.parametrize(("script", "line", "word"), OTHERS)
def test_mistakes_at_the_other_entry_points(script, line, word):
    assert_one_line(typed(*line.split(), script=script), word)


@pytest.mark.parametrize(
    ("script", "line", "word", "cold"),
    [
        ("train.py", "train.lr=a\nb", "\\n", True),
        ("train.py", "optimizer.options=3", "optimizer.options", False),
        ("train.py", "-m seed=0,1 paths.cache=/dev/null", "/dev/null", True),
        ("reproduce.py", "experiment=smoke ~nope", "nope", True),
        ("paper.py", "paths.runs=", "no sweep", True),
        ("approximation.py", "--tasks agreemen", "agreemen", False),
        ("sharpness.py", "/nowhere", "/nowhere", False),
        ("benchmark.py", "--methods samm", "did you mean 'sam'", False),
        ("submission.py", "--check /nowhere", "/nowhere", False),
        ("export_wandb.py", "/nowhere", "/nowhere", False),
        ("records.py", "mend", "mend", False),
        ("verify.py", "--rerun -1", "--rerun", False),
    ],
)
def test_mistakes_as_a_user_types_them(tmp_path, script, line, word, cold):
    """By a fresh interpreter, or by one that has to import all of dsam: either misses what a script does not import."""
    how = {"cold": True} if cold else {"before": "faults:forgets_dsam"}
    typed_ = command(*line.split(" "), script=script, cwd=tmp_path, **how)
    assert_one_line(Done(typed_.returncode, typed_.stdout, typed_.stderr, [str(p) for p in tmp_path.iterdir()]), word)
