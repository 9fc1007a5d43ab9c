"""Tables, figures, model card and report from the runs that are there: python experiments/paper.py experiment=smoke

Without experiment=, the runs of the latest sweep that had no name. Also takes paths.runs=DIR.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsam.command_line import one_line_errors, paper

if __name__ == "__main__":
    with one_line_errors():
        paper(sys.argv[1:])
