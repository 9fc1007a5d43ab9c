"""Asks the Hugging Face hub with patience, and says in a line what it waits for or why it has given up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..text import described, duration

PATIENCE = 600.0
"""Seconds of trouble, without a byte in between, after which the hub is given up."""
UNREACHED = 5.0
"""The same where no connection has come about yet: most often there is no network."""
SLOW = 5.0
"""Seconds without an answer after which that is said."""
LONGEST_WAIT = 30.0
"""Seconds between two requests at most, but where the hub itself asks for more."""
CONNECT, READ = 10.0, 60.0
"""Seconds for a connection, and for each next part of an answer."""

PASSING = (408, 425, 429, 500, 502, 503, 504)
NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "ProxyError")
BROKEN = (*NOT_CONNECTED, "ReadError", "ReadTimeout", "WriteError", "WriteTimeout", "CloseError", "RemoteProtocolError")
WAYS_OUT = "local files need no hub: data=local data.root=DIR for data, model.path=DIR for a model"


@dataclass(frozen=True)
class Repo:
    """What is asked for: a "dataset" or a "model" of the hub, by its name, at a revision."""

    kind: str
    id: str
    revision: str

    def __str__(self) -> str:
        return f"{'data set' if self.kind == 'dataset' else self.kind} {self.id} at {self.revision}"

    def unavailable(self, problem: str) -> UserError:
        return UserError(f"cannot get the {self} from the Hugging Face hub: {problem}; {WAYS_OUT}")


def offline(repo: Repo) -> str | None:
    """The variable that forbids to ask the hub, if one does."""
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        forbids = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(name)]
        return (forbids or ["HF_HUB_OFFLINE"])[0]
    return "HF_DATASETS_OFFLINE" if repo.kind == "dataset" and _is_set("HF_DATASETS_OFFLINE") else None


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


class Patience:
    """How long trouble has gone on. One for all that is asked of one repository."""

    def __init__(self, repo: Repo, say: Callable[[str], None], limit: float | None = None):
        self.repo, self.say = repo, say
        self.limit = PATIENCE if limit is None else limit
        self.reached = False
        self.renewed()

    def renewed(self) -> None:
        """Something came: what follows is new trouble."""
        self.since: float | None = None
        self.wait = 1.0

    @contextmanager
    def answer_to(self, what: str) -> Iterator[None]:
        """Around the wait for an answer: says so where it is long."""
        timer = threading.Timer(SLOW, self.say, [f"the Hugging Face hub has not answered yet: waiting for {what}"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def after(self, error: Exception, what: str) -> None:
        """Waits after an error that may pass, and says so; raises UserError for one that does not, or has lasted."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        name = type(error).__name__
        self.reached |= status is not None or name not in NOT_CONNECTED
        if status not in PASSING and (status is not None or name not in BROKEN):
            raise self.repo.unavailable(why(error, self.repo)) from None
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        wait = _asked_wait(error)
        if wait is None:
            wait, self.wait = self.wait, min(2 * self.wait, LONGEST_WAIT)
        if now - self.since + wait > (self.limit if self.reached else UNREACHED):
            lasted = f" for {duration(now - self.since)}" if now - self.since >= 1 else ""
            asks = f" and asks to wait {duration(wait)}" if _asked_wait(error) is not None else ""
            raise self.repo.unavailable(f"{why(error, self.repo)}{lasted}{asks}") from None
        self.say(f"{what}: {why(error, self.repo)}; asking again in {duration(wait)}")
        time.sleep(wait)


def time_limit() -> Any:
    """For one request, in the client's own kind."""
    from huggingface_hub import get_session

    return type(get_session().timeout)(READ, connect=CONNECT)


def _asked_wait(error: Exception) -> float | None:
    """Seconds that the hub asks to wait (Retry-After, or RateLimit where nothing is left of it)."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    asked = headers.get("Retry-After", "").strip()
    return float(asked) if asked.isdecimal() else None  # a date is as good as nothing: clocks differ


def why(error: Exception, repo: Repo) -> str:
    """What went wrong, in words for people."""
    from huggingface_hub import constants, errors, get_token

    known = get_token() is not None
    response = getattr(error, "response", None)
    address = f"{constants.ENDPOINT}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.id}"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if response is not None:
        said = response.headers.get("X-Error-Message") or ""
        if isinstance(error, errors.GatedRepoError):
            if known:
                return f"it is gated and your token gives no access to it: ask for access at {address}"
            return f"it is gated: ask for access at {address}, then {log_in}"
        if isinstance(error, errors.RevisionNotFoundError):
            return "it has no such revision: give the hash of one of its own commits"
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return "it has no such file"
        if response.status_code == 401 and "credentials" in said:
            return f"the hub does not know your token (401, {said}): {log_in} anew"
        if isinstance(error, errors.RepositoryNotFoundError) or response.status_code == 401:
            kind = "data set" if repo.kind == "dataset" else repo.kind
            return f"there is no such {kind}, or it is private and " + (
                "your token gives no access to it" if known else f"you are not logged in ({log_in})"
            )
        return f"the hub answers {response.status_code}" + (f" ({said})" if said else "")
    name = type(error).__name__
    if name in NOT_CONNECTED:
        return f"no network, or none to {constants.ENDPOINT} ({described(error)})"
    if name.endswith("Timeout"):
        return f"the hub gave no answer within {READ:g} s"
    if name in BROKEN:
        return f"the connection broke ({described(error)})"
    if name == "LocalProtocolError":  # whose message holds the token
        return f"the request could not be written, most likely for a character in the token: {log_in} anew"
    return described(error)
