"""How many CPUs this process may use."""

import os

from .errors import UserError


def cpus() -> int:
    """By its affinity, its container's quota, and LOKY_MAX_CPU_COUNT, a limit of the user's own that scikit-learn keeps
    as well. UserError where that names no number."""
    from joblib.externals import loky  # takes a while, and not every command needs it

    try:
        return loky.cpu_count()  # joblib.cpu_count() is 1 where the system has no semaphores
    except ValueError:
        limit = os.environ["LOKY_MAX_CPU_COUNT"]
        raise UserError(f"LOKY_MAX_CPU_COUNT={limit} is no number of CPUs: name one, or unset it") from None
