"""How sharp a finished run's minimum is: python experiments/sharpness.py results/runs/TASK/MODEL/OPTIMIZER/ID

The run must have been made with checkpoint.keep_weights=true. --help lists what can be set.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsam.command_line import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        from dsam.sharpness.measure import main

        main(sys.argv[1:])
