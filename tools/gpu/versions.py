"""Do the project's modules import on that machine, and does importing alone start CUDA (runs are forked after it)?"""

import importlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

NAMES = "torch transformers tokenizers accelerate numpy pandas scipy scikit-learn hydra-core omegaconf wandb datasets"
MODULES = (
    "dsam.runs.run",
    "dsam.sweeps.sweep",
    "dsam.results.tables.build",
    "dsam.results.plots",
    "dsam.benchmark.throughput",
    "dsam.integrations.transformers",
    "dsam.integrations.distributed",
    "dsam.sharpness.measure",
    "hydra",
)
found = {"versions": {}, "imports that fail": {}}
for name in NAMES.split():
    try:
        found["versions"][name] = version(name)
    except PackageNotFoundError:
        found["versions"][name] = None
for name in MODULES:
    try:
        importlib.import_module(name)
    except Exception as error:
        found["imports that fail"][name] = f"{type(error).__name__}: {error}"
found["CUDA started by imports"] = torch.cuda.is_initialized()
if torch.cuda.is_available():
    found["gpu"] = str(torch.cuda.get_device_properties(0))
text = json.dumps(found, indent=1)
Path(os.environ["OUT"], "versions.json").write_text(text)
print(text)
