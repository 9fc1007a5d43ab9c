"""A search: Optuna proposes settings, each trial a recorded run like any other, from the scores of those before."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override

from ..config import Config
from ..errors import UserError
from .choose import score
from .compose import configurations
from .planned import Planned
from .sweep import plan

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DIGITS = 3
"""Of a proposed number, so that it can be read and typed."""

Jobs = Callable[[Sequence[Sequence[str]]], Iterable[tuple[dict, str | None]]]
"""Lists of overrides -> what `dsam.sweeps.compose.composed` makes of each."""


def is_searched(override: Override) -> bool:
    """Whether a value is proposed: `interval(…)` and `choice(…)`; `a,b` and `range(…)` are every one of theirs."""
    value = override.value()
    return isinstance(value, IntervalSweep) or (isinstance(value, ChoiceSweep) and not value.simple_form)


class Search:
    """One study for each combination of what is not searched. A trial's score is its mean over the seeds; diverged
    runs are the worst.

    The same command proposes the same trials again as far as they have been scored, so that it goes on where an
    earlier one stopped. More trials than before begin with those before.
    """

    def __init__(
        self,
        jobs: Jobs,
        space: Sequence[Override],
        fixed: Sequence[Sequence[str]],
        seeds: Sequence[Sequence[str]],
        trials: int,
        at_once: int,
        seed: int,
    ):
        """
        Args:
            jobs: composes configurations.
            space: what is searched. fixed: the overrides of each study. seeds: those that tell a trial's runs apart.
            trials: of each study. at_once: those proposed before their scores are known. seed: of the proposals.
        """
        if not space:
            raise UserError("hydra/sweeper=optuna searches interval(…) and choice(…): 'model.rho=interval(0.01,0.2)'")
        for name, value in (("n_trials", trials), ("n_jobs", at_once)):
            if type(value) is not int or value < 1:
                raise UserError(f"hydra.sweeper.{name}={value} must be a whole number of at least 1")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise UserError(f"hydra.sweeper.seed={seed} must be a whole number from 0 to 2^32 - 1")
        self.jobs, self.fixed, self.seeds, self.trials, self.at_once = jobs, fixed, seeds, trials, at_once
        self.space = {o.get_key_element(): distribution(o) for o in space}
        optuna = _optuna()
        self.studies = [
            optuna.create_study(
                direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=at_once > 1)
            )
            for _ in fixed
        ]

    def rounds(self) -> Iterator[tuple[str, list[Config]]]:
        """(a line of words, the configurations of all trials so far), each time with some more; their runs are to be
        done before the next is asked for."""
        configs: list[Config] = []
        for start in range(0, self.trials, self.at_once):
            asked = []
            for study, fixed in zip(self.studies, self.fixed, strict=True):
                for _ in range(min(self.at_once, self.trials - start)):
                    trial = study.ask(self.space)
                    given = [*fixed, *(f"{key}={_written(v, self.space[key])}" for key, v in trial.params.items())]
                    new = configurations(self.jobs([[*given, *seed] for seed in self.seeds]))
                    asked.append((study, trial, new))
                    configs += new
            yield f"trials {start + 1} to {min(start + self.at_once, self.trials)} of {self.trials}", list(configs)
            for study, trial, new in asked:
                scores = list(map(_scored, plan(new)))
                if None in scores:
                    study.tell(trial, state=_optuna().trial.TrialState.FAIL)
                else:
                    study.tell(trial, float(np.mean(scores)))  # type: ignore[arg-type]


def distribution(override: Override) -> "BaseDistribution":
    """What an override of `interval(…)` or `choice(…)` is to Optuna. UserError where it is nothing to choose from."""
    optuna, value = _optuna(), override.value()
    if not isinstance(value, IntervalSweep):
        return optuna.distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
    kinds = {int: optuna.distributions.IntDistribution, float: optuna.distributions.FloatDistribution}
    whole = all(type(end) is int for end in (value.start, value.end))
    try:
        return kinds[int if whole else float](value.start, value.end, log="log" in value.tags)
    except ValueError as error:
        raise UserError(f"'{override.input_line}': {error}") from None


def _written(value: object, space: "BaseDistribution") -> str:
    if not isinstance(value, float):
        return str(value)
    low, high = space.low, space.high  # type: ignore[attr-defined]
    # As many more as a narrow interval needs, to tell its values apart and stay within it.
    digits = DIGITS + max(0, math.floor(math.log10(max(abs(low), abs(high)) / (high - low)))) if high > low else 15
    return f"{min(max(float(f'{value:.{digits}g}'), low), high):.15g}"


def _scored(run: Planned) -> float | None:
    return -np.inf if run.status == "diverged" else score(run)


def _optuna():
    try:
        import optuna
    except ImportError:
        raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'optuna>=4'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
