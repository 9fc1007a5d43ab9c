"""Rebuilds runs for W&B from their files alone: python experiments/export_wandb.py experiment=smoke

Also takes paths.runs=DIR, or run folders by path; --mode online uploads (make wandb-sync). --help lists the rest.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsam.command_line import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        from dsam.runs.export import main

        main(sys.argv[1:])
