"""An experiment from its first run to its report: python experiments/reproduce.py experiment=smoke

Runs what is missing of the sweep, then does what paper.py does; with `fresh_seeds`, for those of the chosen
variants as well. Takes what train.py takes for a sweep.
"""

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dsam.command_line import one_line_errors, reproduce  # noqa: E402


def sweep() -> int:
    """Runs train.py with this program's arguments and returns its exit status. What asks this program to stop asks the
    sweep, which saves its runs first."""
    # A process of its own: Hydra ends the program in its own ways.
    child = subprocess.Popen([sys.executable, str(ROOT / "experiments" / "train.py"), *sys.argv[1:]])
    numbers = (signal.SIGINT, signal.SIGTERM)
    earlier = {number: signal.signal(number, lambda number, _: child.send_signal(number)) for number in numbers}
    try:
        return child.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(reproduce(sys.argv[1:], sweep))
