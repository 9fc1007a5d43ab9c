"""An experiment from its first run to its report: python experiments/reproduce.py experiment=smoke

Runs what is missing of the sweep, then does what paper.py does; with `fresh_seeds`, those of the chosen
variants as well. Takes what train.py takes.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dsam.command_line import chosen, one_line_errors, paper  # noqa: E402

if __name__ == "__main__":
    with one_line_errors():
        # A process of its own: Hydra ends the program in its own ways.
        sweep = subprocess.run([sys.executable, str(ROOT / "experiments" / "train.py"), *sys.argv[1:]])
        if sweep.returncode not in (0, 1):
            raise SystemExit(sweep.returncode)
        paper(sys.argv[1:])
        if again := chosen(sys.argv[1:]):
            paper(again)
        raise SystemExit(sweep.returncode)  # 1: some runs failed, and the tables show which
