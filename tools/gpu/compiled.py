"""Does torch.compile pay on the GPU: a step under a CUDA graph of ours, by `reduce-overhead`, and compiled code in our
graph. Writes $OUT/compiled.json: ms a step (a median), seconds to the first step, the loss after twelve steps."""

import json
import os
import time
from pathlib import Path

import torch
from timing import seconds_of, wait
from transformers import BertConfig, BertForSequenceClassification

from dsam.methods import METHODS, ExampleLosses
from dsam.text import first_line
from dsam.training.device import prepare_for_gpu, to
from dsam.training.graphs import graphs_for
from dsam.training.loop import parameter_groups

DEVICE = torch.device(os.environ["GPU_CHECK_DEVICE"])
GPU = DEVICE.type == "cuda"
BATCH, LENGTH, TURNS = (32, 32, 5) if GPU else (4, 8, 1)  # CoLA's
shape = {} if GPU else dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
WAYS = {  # what compiles the model, None for nothing; whether the step is a graph of ours
    "a graph": (None, True),
    "a graph, each weight cast by itself": (None, True),
    "compiled, reduce-overhead": ({"mode": "reduce-overhead"} if GPU else {"backend": "eager"}, False),
    "compiled, in a graph": ({} if GPU else {"backend": "eager"}, True),
}
found = {}


def measured(name, way):
    compiled_by, graphed = WAYS[way]
    torch.manual_seed(0)
    network = BertForSequenceClassification(BertConfig(**shape)).to(DEVICE).train()
    prepare_for_gpu(network, None if compiled_by is not None or "each" in way else torch.bfloat16)
    method = METHODS[name](network)
    if compiled_by is not None:
        network.compile(**compiled_by)
    optimizer = torch.optim.AdamW(parameter_groups(network, 0.01), lr=1e-5, fused=True)
    graphs = graphs_for(method, network, torch.bfloat16, 1.0, graphed)
    ids = torch.randint(1000, 2000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    batch["attention_mask"][: BATCH // 2, -4:] = 0

    def step():
        if graphs:
            loss = graphs.backward(batch)
        else:
            torch.compiler.cudagraph_mark_step_begin()
            loss = method.backward(ExampleLosses(network, to(batch, DEVICE), torch.bfloat16), wait=False)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    began = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - began
    for _ in range(11):  # what compiles, warms up and captures
        loss = step()
    row = {"ms": round(1e3 * seconds_of(step, TURNS), 2), "first step, s": round(first, 1), "loss": float(loss)}
    return row | {"captured": bool(graphs and graphs.captured)}


for name in os.environ.get("GPU_COMPILED", "plain,sam,per_instance").split(","):
    for way, (compiled_by, _) in WAYS.items():
        if name == "per_instance" and compiled_by is not None:  # it looks into the layers and runs uncompiled
            continue
        try:
            found[f"{name}, {way}"] = measured(name, way)
        except Exception as error:  # such a machine may lack a compiler
            found[f"{name}, {way}"] = {"error": first_line(error)}
        print(name, way, found[f"{name}, {way}"], flush=True)
        Path(os.environ["OUT"], "compiled.json").write_text(json.dumps(found, indent=1))
