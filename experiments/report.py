"""Tables, figures and the report from the runs that are there: python experiments/report.py experiment=smoke

Without experiment=, the runs of the latest sweep that had no name. Also takes paths.runs=DIR.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsam.command_line import one_line_errors, report

if __name__ == "__main__":
    with one_line_errors():
        report(sys.argv[1:])
