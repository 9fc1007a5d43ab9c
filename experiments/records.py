"""What can be committed of an experiment's runs: python experiments/records.py pack|unpack experiment=NAME

`pack` keeps each run's configuration, result, log of losses and provenance (no weights) in
results/records/NAME.zip, beside the runs that the file has already; `unpack` writes those run folders that are missing.
Also takes paths.runs=DIR and paths.records=DIR.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsam.command_line import one_line_errors, records

if __name__ == "__main__":
    with one_line_errors():
        records(sys.argv[1:])
