"""One run, or with -m (or an experiment) a sweep of runs.

python experiments/train.py task=rte model=minilm model.path=DIR optimizer=dsam data=local data.root=DIR seed=3
python experiments/train.py -m task=agreement,similarity optimizer=adamw,sam,dsam 'seed=range(0,5)' launcher.workers=2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # dsam and hydra_plugins lie beside this folder

import hydra
from omegaconf import DictConfig

from dsam.command_line import run_one, start


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    run_one(cfg)


if __name__ == "__main__":
    start(main, sys.argv[1:])
