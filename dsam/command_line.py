"""What the entry points share: Hydra's overrides in, one-line errors and exit statuses out."""

import argparse
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from . import refusals
from .config import CONF, Config, Paths
from .errors import Note, NothingFinished, Parser, Stopped, UserError
from .mistakes import coerced
from .output import reader_may_leave
from .text import counted, first_line

if TYPE_CHECKING:
    from .sweeps.planned import Planned
    from .sweeps.search import Search


@contextmanager
def one_line_errors():
    """A user's mistake ends the program with one line and status 2; Ctrl-C with 130. No traceback for either, and none
    where a reader of the output has seen enough (`| head -1`)."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda *given, **named: _told(usual, *given, **named)
    try:
        with reader_may_leave(), _ended_in_one_line():
            yield
    finally:
        warnings.formatwarning = usual


@contextmanager
def _ended_in_one_line():
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.signum) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _told(usual: Callable[..., str], message, category, *place, **more) -> str:
    """A note is for people as it is; of other warnings they see where in the code it was."""
    return f"{message}\n" if issubclass(category, Note) else usual(message, category, *place, **more)


def _scratch() -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory(prefix="dsam-")
    except OSError as error:  # what tempfile raises where it finds no folder that takes a file
        raise UserError(
            f"no temporary file can be written ({error.strerror or error}): make room, or set TMPDIR=DIR"
        ) from None


def start(main: Callable[[], None], arguments: Sequence[str]) -> None:
    """Checks Hydra's arguments, then hands over to the Hydra main."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from . import overrides

    with one_line_errors(), _scratch() as scratch:
        given = flags(arguments)
        if given.experimental_rerun:
            raise UserError("--experimental-rerun is not supported: a run's folder holds its config.yaml")
        if given.run and given.multirun:
            raise UserError("--run and --multirun contradict each other; --hydra-help lists the flags")
        if given.resolve and not given.cfg:
            raise UserError("--resolve goes with --cfg; --hydra-help lists the flags")
        if not given.shell_completion:  # else they are Hydra's to complete
            more = overrides.own_folder(given.config_dir)
            experiment = any(o.startswith("experiment=") and o != "experiment=null" for o in given.overrides)
            alone = not (given.multirun or experiment)
            if not (
                alone or given.cfg or given.info or given.help or any("launcher.plan=" in o for o in given.overrides)
            ):
                from .sweeps import server

                server.warm()  # while the jobs are composed
            known = set(given.overrides)
            checked = overrides.check(given.overrides, CONF, more, one_run=alone)
            flags_given = [a for a in arguments if a not in known]
            if more:  # Hydra would take ~ for a folder of that name
                place = re.compile(rf"(^|=){re.escape(given.config_dir)}$")
                flags_given = [place.sub(lambda found: found[1] + str(more), a) for a in flags_given]
            # Flags last: one that may have a value would take an override for it.
            sys.argv[1:] = checked + flags_given
        os.environ["DSAM_SCRATCH"] = scratch  # for the files that Hydra insists on writing
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print over many lines
        try:
            main()
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"configuration: {first_line(error)}") from None


def flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's documented flags and the overrides among them. UserError for what is neither."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for short, long in (("-h", "help"), ("-r", "run"), ("-m", "multirun"), ("-sc", "shell-completion")):
        parser.add_argument(short, f"--{long}", action="store_true")
    for long in ("hydra-help", "version", "resolve"):
        parser.add_argument(f"--{long}", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-i", "--info", nargs="?", const="all",
                        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"))  # fmt: skip
    for short, long in (("-p", "package"), ("-cp", "config-path"), ("-cn", "config-name"), ("-cd", "config-dir")):
        parser.add_argument(short, f"--{long}")
    parser.add_argument("--experimental-rerun")
    try:
        return parser.parse_intermixed_args(_info_last(arguments))
    except UserError as error:
        raise UserError(f"{str(error).removesuffix('; see --help')}; --hydra-help lists the flags") from None


def _info_last(arguments: Sequence[str]) -> list[str]:
    """The same with a --info that has no value at the end, where it does not take an override for one."""
    bare = [i for i, a in enumerate(arguments) if a in ("-i", "--info") and "=" in "".join(arguments[i + 1 : i + 2])]
    rest = [a for i, a in enumerate(arguments) if i not in bare]
    return rest + ["--info"] * bool(bare)


def load(cfg: DictConfig) -> Config:
    """The checked configuration of one composed job, with the name of its experiment."""
    return Config.load(
        {k: v for k, v in _unresolved(cfg).items() if k != "hydra"}, _hydra(cfg).runtime.choices.get("experiment")
    )


def _hydra(cfg: DictConfig) -> DictConfig:
    """Hydra's own settings of a composed job."""
    from hydra.core.hydra_config import HydraConfig

    return cfg.get("hydra") or HydraConfig.get()


def _unresolved(cfg: DictConfig) -> dict:
    return OmegaConf.to_container(cfg, resolve=False)


def run_one(cfg: DictConfig) -> None:
    """One run in this process; prints where its record lies and its score."""
    from .runs.identity import identify
    from .runs.record import Record
    from .runs.run import run

    with one_line_errors():
        config = load(cfg)
        refusals.require_no_sweep(config, OmegaConf.select(_hydra(cfg), "sweeper.params"))
        refusals.require_of_one(config)
        refusals.require_read([config])
        refusals.say_untaken([_unresolved(cfg)])
        if config.launcher.plan:
            from .sweeps.sweep import plan

            _show_plan(plan([config]), [config])
            return
        try:
            result = run(config)
        except (UserError, Stopped, KeyboardInterrupt):
            raise
        except Exception as error:  # a failed run: one line here, the traceback in its log
            folder = identify(config).folder
            if not folder.exists():  # it never came to be one: a mistake of ours, to be seen
                raise
            reason = Record(folder).fail(error)
            print(f"failed: {reason}; log: {folder / 'log.txt'}; the same command goes on", file=sys.stderr)
            raise SystemExit(1) from None
        print(f"{identify(config).folder}")
        for name in ("best", "last"):
            if result[name]:
                metrics = ", ".join(
                    f"{split} {metric} {value if value is None else format(value, '.4f')}"
                    for split, values in result[name]["metrics"].items()
                    for metric, value in values.items()
                )
                print(f"{name}: step {result[name]['step']}, {metrics}")
        if result["status"] == "diverged":
            print(f"diverged: {result['diverged']}")
        elif result["last"] and not (result["best"] and result["best"]["score"] is not None):
            splits = (result["best"] or result["last"])["metrics"].items()
            where = [split for split, values in splits if None in [values[name] for name in config.task.scored_by]]
            print(f"no score: {result['metric']} is undefined on {' and '.join(where)}, whose labels or answers vary "
                  "too little")  # fmt: skip


def _show_plan(runs: list["Planned"], configs: list[Config], line: str = "") -> None:
    """Prints what would run."""
    from .sweeps import estimate
    from .sweeps import sweep as sweeps
    from .sweeps.planned import counts, unfinished

    launcher, parents = configs[0].launcher, sweeps.plan(sweeps.parents([r.config for r in unfinished(runs)]))
    if launcher.measure:
        estimate.measure([*parents, *runs])
    if line:
        print(line)
    sweeps.show_plan(runs, launcher.at_once(max(1, len(unfinished(runs)))))
    if parents:
        longer = estimate.total(parents, launcher.at_once(max(1, len(unfinished(parents)))))
        of = counted(len(parents), "other run")
        print(f"They start from {of}, which are done first: {counts(parents)}. {longer}".rstrip())


def sweep(jobs: Iterable[tuple[dict, str | None]]) -> None:
    """All runs of a multirun, then those of `fresh_seeds`. Leaves with status 1 and a list where some failed.

    Args:
        jobs: each one's composed configuration and the name of its experiment.
    """
    from .sweeps.compose import configurations

    with one_line_errors():
        jobs = list(jobs)
        refusals.say_untaken(plain for plain, _ in jobs)
        _carry_out([("", configurations(jobs))])


def search(found: "Search") -> None:
    """The runs of a search, as those of a sweep. It ends where a run failed, since others hang on its score."""
    with one_line_errors():
        if all("." in key for key in found.space):  # else which file would take a default up is part of the search
            refusals.say_untaken(plain for plain, _ in found.jobs(found.fixed))
        _carry_out(found.rounds())


def _carry_out(rounds: Iterable[tuple[str, list[Config]]]) -> None:
    """The runs of each round, which are those of the round before and more, under a line of words."""
    from .runs import manifest
    from .sweeps import choose
    from .sweeps import sweep as sweeps
    from .sweeps.planned import unfinished

    failed: list[Planned] = []
    lacking: list[str] = []
    for line, configs in rounds:
        refusals.require_name(configs[0])
        refusals.require_one_sweep(configs)
        refusals.require_read(configs)
        runs, first = sweeps.plan(configs), configs[0]
        refusals.require_apart(runs)
        fresh = choose.check_fresh(configs)
        if fresh or line:
            choose.check_comparable(configs)
        if first.launcher.plan:
            if unfinished(runs):  # the next round's hang on their scores
                break
            continue
        sweeps.require_clean(configs)
        run_all = sweeps.run_all
        if first.launcher.name == "slurm":
            from .sweeps import slurm

            slurm.require()
            run_all = slurm.run_all
        if line:
            print(line)
        name, command = first.experiment or manifest.UNNAMED, shlex.join(sys.argv)
        failed = sweeps.work(runs, name, command, run_all)
        if unfinished(runs):
            break
    if first.launcher.plan:
        _show_plan(runs, configs, line)
        if fresh:
            print(f"Then the best variant of each task, model and optimizer with the seeds {fresh}.")
        return
    if (fresh or line) and unfinished(runs) and not failed:  # launcher.wait=false
        print("the same command goes on with these runs' scores, once they are finished")
    elif (fresh or line) and not (line and failed):  # a search that stopped has not come to its choice
        chosen, rows = choose.choose(runs)
        print(choose.described(rows))
        lacking = choose.lacking(rows) if fresh else []
        if fresh and not chosen and manifest.forget(Path(first.paths.runs), name + manifest.CHOSEN):
            print(f"{name}{manifest.CHOSEN} was an earlier choice, and is forgotten; its runs stay", file=sys.stderr)
        if chosen and fresh:
            print(f"the chosen variants with the seeds {fresh}, as experiment {name}{manifest.CHOSEN}:")
            again = sweeps.plan(choose.reseeded(chosen, fresh))
            failed += sweeps.work(again, name + manifest.CHOSEN, command, run_all, rows, runs)
    for r in failed:
        print(f"failed: {r.title}: {r.reason}; log: {r.identity.folder / 'log.txt'}", file=sys.stderr)
    for cell in lacking:
        print(f"nothing chosen for {cell}: no variant of it has all its runs finished with a score", file=sys.stderr)
    if failed:
        print("the same command runs only what is missing", file=sys.stderr)
    if failed or lacking:
        raise SystemExit(1)


def settings_parser(script: str, text: str, takes: str) -> Parser:
    """For what reads runs that are there: settings, and a folder of the user's own configurations."""
    parser = Parser(prog=script, description=text)
    parser.add_argument("overrides", nargs="*", help=takes)
    parser.add_argument("--config-dir", metavar="DIR", help="a folder of your own configurations")
    return parser


def named(given: argparse.Namespace, known: Sequence[str] = ()) -> tuple[str, DictConfig]:
    """The name of the experiment whose runs are meant, and the configuration that says where they lie.

    `known`: beginnings of settings that the caller has a use for itself; of others it is said that they have none.
    """
    from . import overrides
    from .runs import manifest

    more = overrides.own_folder(given.config_dir)
    given.overrides = [a.lstrip("+") for a in given.overrides]
    names = [a.split("=", 1)[1] for a in given.overrides if a.startswith("experiment=")]
    name = names[-1] if names else manifest.UNNAMED
    checked = overrides.check(manifest.configurations_of(given.overrides), CONF, more)
    wanted = [a for a in checked if a.startswith(("experiment=", "paths."))]
    if idle := [a for a in checked if a not in wanted and not a.startswith(tuple(known))]:
        print(f"note: all runs of {name} are meant: no effect of {', '.join(idle)}", file=sys.stderr)
    config = overrides.compose_config(wanted, CONF, more=more)
    config.paths = coerced(OmegaConf.to_container(config.paths), Paths, "paths").model_dump()  # ~ as a run takes it
    return name, config


def chosen(name: str, config: DictConfig) -> str | None:
    """The name of the runs with fresh seeds of the same experiment, if there are any."""
    from .runs import manifest

    return manifest.chosen_from(Path(config.paths.runs), name)


def paper(arguments: Sequence[str]) -> None:
    """Writes what `dsam.results.report` makes of an experiment's runs."""
    text = "Tables, figures, model card and report from the runs that are there."
    takes = (
        "experiment=NAME (else the latest sweep without a name), paths.runs=DIR, paths.tables=DIR, paths.figures=DIR"
    )
    write_paper(*named(settings_parser("paper.py", text, takes).parse_intermixed_args(list(arguments))))


def reproduce(arguments: Sequence[str], sweep: Callable[[], int]) -> int:
    """`sweep`, which runs train.py with these arguments and returns its exit status; then what `paper` does, also for
    the runs with fresh seeds. Returns that status: 1 where some runs failed, which the tables show."""
    given = flags(arguments)
    last = dict(o.lstrip("+").partition("=")[::2] for o in given.overrides)
    told = given.help or given.hydra_help or given.version or given.cfg or given.info or given.shell_completion
    named_one = last.get("experiment", "null") != "null"
    if not (told or given.multirun or "hydra.mode" in last or named_one):
        raise UserError("reproduce.py makes a sweep's tables: add experiment=NAME or -m; train.py runs one run")
    if named_one and not (told or given.multirun or "hydra.mode" in last):
        _require_sweep(last["experiment"], given.config_dir)
    status = sweep()
    if status not in (0, 1) or told or last.get("launcher.plan", "").lower() in ("true", "yes", "on", "1"):
        return status
    given.overrides = [o for o in given.overrides if o.lstrip("+").startswith(("experiment=", "paths."))]
    name, config = named(given)
    try:
        write_paper(name, config)
        if again := chosen(name, config):
            write_paper(again, config)
    except NothingFinished as nothing:  # all failed, or wait for a cluster
        print(f"no tables: {nothing}", file=sys.stderr)
    return status


def _require_sweep(experiment: str, folder: str | None) -> None:
    """UserError where the experiment's file does not say that it is a sweep."""
    from . import overrides

    more = overrides.own_folder(folder)
    checked = overrides.check([f"experiment={experiment}"], CONF, more)
    mode = overrides.compose_config(checked, CONF, with_hydra=True, more=more).hydra.mode
    if mode is None or mode.name != "MULTIRUN":
        raise UserError(
            f"reproduce.py makes a sweep's tables, and experiment={experiment} is none: add -m, or hydra: "
            "{mode: MULTIRUN} in its file"
        )


def write_paper(name: str, config: DictConfig) -> None:
    """Tables, figures, page and report; prints the main table and where all lies."""
    from .results.report import make as report
    from .runs import manifest

    manifest.require_unpacked(Path(config.paths.runs), Path(config.paths.records), name)
    made = report.make(name, config.paths.runs, config.paths.tables, config.paths.figures)
    print(f"\n{made.text}\n")
    for what, where in (
        ("tables", made.tables[0].parent),
        ("figures", made.figures[0].parent),
        ("report", made.html),
        ("runs", config.paths.runs),
    ):
        print(f"{what:8} {where}")
    if again := chosen(name, config):
        print(f"these runs served to choose; those of what they chose: experiment={again}")
    if made.left_over:
        names = ", ".join(map(str, made.left_over))
        print(f"not made from these runs, left from before: {names}; delete what you don't need")


def records(arguments: Sequence[str]) -> None:
    """`pack`: the runs' records into <paths.records>/<experiment>.zip; `unpack`: run folders from it."""
    from .runs import archive

    text = "What can be committed of an experiment's runs, and run folders from it."
    takes = "pack or unpack, then experiment=NAME, paths.runs=DIR, paths.records=DIR"
    given = settings_parser("records.py", text, takes).parse_intermixed_args(list(arguments))
    what, *given.overrides = given.overrides or [""]
    if what not in ("pack", "unpack"):
        raise UserError(f"records.py takes pack or unpack, then experiment=NAME; got '{what}'")
    name, config = named(given)
    runs_dir, path = Path(config.paths.runs), Path(config.paths.records) / f"{name}.zip"
    if what == "pack":
        packed = archive.pack(runs_dir, name, path)
        size = f"{path.stat().st_size / 1e6:.2f} MB"
        print(f"{path}: {counted(packed.finished, 'run')}, {size}; {packed.missing} of the sweep have no result")
        for note in packed.notes:
            print(f"note: {note}")
    else:
        found = archive.unpack(path, runs_dir)
        print(f"{runs_dir}: {counted(found.written, 'run')} written from {path}, {found.there} were there already")
        if found.other:
            print(
                f"note: {found.other} of these {'has' if found.other == 1 else 'have'} another result here than in the "
                "file; paths.runs=DIR with a new folder shows the file's own"
            )
        if more := archive.unlisted(path, runs_dir):
            print(
                f"note: tables follow the sweep of {name} that is here, which does not name {counted(more, 'run')} of "
                "the file; paths.runs=DIR with a new folder shows the file's own"
            )


def verify(arguments: Sequence[str]) -> None:
    """Prints what `dsam.results.verify` finds, line by line. Leaves with status 1 where something differs."""
    from .results import verify as verification

    takes = (
        "experiment=NAME, paths.runs=DIR, paths.tables=DIR; and for runs of another machine that are trained again "
        "data.root=DIR, model.path=DIR"
    )
    parser = settings_parser("verify.py", "Whether an experiment's tables are what its runs say.", takes)
    parser.add_argument("--rerun", type=int, default=1, metavar="N", help="train so many runs again (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="chooses which")
    given = parser.parse_intermixed_args(list(arguments))
    if given.rerun < 0:
        raise UserError(f"--rerun {given.rerun} must be at least 0")
    elsewhere = ("data.root=", "model.path=")
    name, config = named(given, elsewhere)
    places = dict(o.split("=", 1) for o in given.overrides if o.startswith(elsewhere))
    again = verification.Again(given.rerun, given.seed, config.paths.cache, places)
    tables, records = Path(config.paths.tables), Path(config.paths.records)
    differences = 0
    for fine, line in verification.check(name, Path(config.paths.runs), tables, again, records):
        differences += not fine
        print(line if fine else f"differs: {line}", flush=True)
    if differences:
        print(f"{differences} differences")
        raise SystemExit(1)
    print("nothing differs")
