"""A run that a sweep means to do: its frozen configuration, its place, what it will take, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..config import Config
from ..runs.identity import Identity
from ..runs.kept import lacks_weights
from ..runs.record import Record

STATUSES = {s: s for s in ("finished", "diverged", "failed", "missing", "running")} | {"elsewhere": "running elsewhere"}


@dataclass
class Expected:
    """What a run will take; None where nothing is known."""

    seconds: float | None = None
    memory_bytes: int | None = None
    source: str = ""


@dataclass
class Planned:
    """One run of a sweep; its configuration is frozen here."""

    config: Config
    identity: Identity
    status: str = "missing"  # or finished, diverged, failed, running, elsewhere
    reason: str = ""
    started: float = 0.0
    seconds: float = 0.0
    attempts: int = 0
    alone: bool = False  # on its device: it did not fit beside others
    cost: float = 0.0  # the training's arithmetic, in no unit: passes × tokens × weights
    expected: Expected = field(default_factory=Expected)

    @property
    def title(self) -> str:
        c = self.config
        return f"{c.task_label} {c.model.name} {c.optimizer.name} seed {c.seed} [{self.identity.id}]"

    @property
    def done(self) -> bool:
        return self.status in ("finished", "diverged")

    @property
    def record(self) -> Record:
        return Record(self.identity.folder)

    def outcome(self, set_aside: bool = False) -> dict | None:
        """Its result, where it is there with all that was asked of it."""
        result = self.record.result(set_aside)
        return None if result is None or lacks_weights(self.config, self.identity.folder, result) else result


def unfinished(runs: Sequence[Planned]) -> list[Planned]:
    return [r for r in runs if not r.done]


def counts(runs: Sequence[Planned]) -> str:
    number = {s: sum(r.status == s for r in runs) for s in STATUSES}
    return ", ".join(f"{n} {STATUSES[status]}" for status, n in number.items() if n)
