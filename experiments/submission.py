"""GLUE's test-set submission from finished runs that kept their weights (checkpoint.keep_weights=true).

python experiments/submission.py --runs RUN [RUN …] --out DIR                  of each task the best run
python experiments/submission.py --runs-dir results/runs --model bert_base --optimizer dsam --out DIR
python experiments/submission.py --check DIR/submission.zip                     is it what the server takes
python experiments/submission.py --ax RUN                                       an MNLI run's score on AX

DIR gets CoLA.tsv … AX.tsv, submission.zip for https://gluebenchmark.com/submit, and runs.json, which says from which
run each file is. `--fill-majority wnli` answers a task with its most frequent label. --help lists what can be set.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsam.command_line import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        from dsam.submission.make import main

        main(sys.argv[1:])
