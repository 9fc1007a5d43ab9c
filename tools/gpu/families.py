"""Families of encoders on the GPU, with a CUDA graph where one can be captured and without: the same weights after six
steps? and does a capture that fails leave the run unharmed? Writes $OUT/families.json."""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, "tests")  # this script is run in the project's root
import encoders

from dsam.methods import METHODS, ExampleLosses
from dsam.training.device import prepare_for_gpu, to
from dsam.training.graphs import graphs_for

DEVICE = torch.device(os.environ["GPU_CHECK_DEVICE"])
CASES = {"dsam": ("delta_sam", {"weighting": "probe", "layers": 2}), "per_instance": ("per_instance", {})}


FLOAT32 = ("deberta", "fnet")  # whose own code does not run in bfloat16


def trained(family, case, graphed):
    name, options = CASES[case]
    autocast = None if family in FLOAT32 else torch.bfloat16
    network = encoders.model(family, torch.float32).to(DEVICE)
    prepare_for_gpu(network, autocast)
    method = METHODS[name](network, **options)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    graphs = graphs_for(method, network, autocast, 1.0, graphed)
    torch.manual_seed(0)
    for step in range(6):
        batch = encoders.batch(seed=step)
        if graphs:
            graphs.backward(batch)
        else:
            method.backward(ExampleLosses(network, to(batch, DEVICE), autocast), wait=False)
            torch.nn.utils.clip_grads_with_norm_(method.params, 1.0, torch.as_tensor(method.report["gradient_norm"]))
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in network.parameters()]).cpu()
    return weights, "none" if not graphs else "failed" if graphs.failed else "captured"


found = {}
for family in os.environ.get("GPU_FAMILIES", ",".join(encoders.FAMILIES)).split(","):
    for case in CASES:
        try:
            without, _ = trained(family, case, False)
            weights, how = trained(family, case, True)
            row = {"graph": how, "finite": bool(weights.isfinite().all())}
            row["largest difference"] = float((weights - without).abs().max())
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        found[f"{family} {case}"] = row
        print(family, case, row, flush=True)
        Path(os.environ["OUT"], "families.json").write_text(json.dumps(found, indent=1))
