"""Whether an experiment's tables are what its runs say: python experiments/verify.py experiment=smoke [--rerun N]

Makes the tables again from the runs and compares every byte with those under paths.tables; checks each result's seal
and each run's name; trains N runs (default 1) again, which must give the same weights and scores. Without run folders,
as in a fresh clone, it makes again what follows from cells.csv. Leaves with 0, or with 1 and a line per difference.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsam.command_line import one_line_errors, verify

if __name__ == "__main__":
    with one_line_errors():
        verify(sys.argv[1:])
