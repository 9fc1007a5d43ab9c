"""CUDA graphs against steps without: the same weights? how much faster? Writes $OUT/graphs.json."""

import json
import os
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grads_with_norm_
from transformers import BertConfig, BertForSequenceClassification

from dsam.methods import METHODS, ExampleLosses
from dsam.training.device import prepare_for_gpu, to
from dsam.training.graphs import Graphs
from dsam.training.loop import parameter_groups

DEVICE = torch.device(os.environ["GPU_CHECK_DEVICE"])
OUT = Path(os.environ["OUT"], "graphs.json")
CASES = {
    "adamw": ("plain", {}),
    "sam": ("sam", {}),
    "dsam": ("delta_sam", {"weighting": "probe", "layers": 2}),
    "dsam_curvature": ("delta_sam", {"weighting": "curvature", "layers": 2}),
    "per_instance": ("per_instance", {}),
    "rw_sam": ("delta_sam", {"weighting": "gibbs"}),
    "m_sam": ("m_sam", {"m": 8}),
    "asam": ("asam", {}),
}
MINILM = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def batches(steps, lengths):
    g = torch.Generator().manual_seed(0)
    for k in range(steps):
        ids = torch.randint(1000, 20000, (32, lengths[k % len(lengths)]), generator=g)
        mask = torch.ones_like(ids)
        mask[:16, -4:] = 0
        yield {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0, "labels": ids[:, 0] % 2}


def train(case, shape, autocast, graphs, steps=24, lengths=(32, 48)):
    name, options = CASES[case]
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**shape)).to(DEVICE).train()
    prepare_for_gpu(model, autocast)
    method, params = METHODS[name](model, **options), list(model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-5, fused=True)
    torch.manual_seed(1)
    graphed = Graphs(method, model, autocast, 1.0) if graphs else None
    times, losses = [], []
    for batch in batches(steps, lengths):
        began = time.perf_counter()
        if graphed:
            loss = graphed.backward(batch)
        else:
            loss = method.backward(ExampleLosses(model, to(batch, DEVICE), autocast), wait=False)
            clip_grads_with_norm_(params, 1.0, torch.as_tensor(method.report["gradient_norm"]))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    steady = sorted(times[len(times) // 2 :])
    weights = torch.cat([p.detach().flatten().float() for p in params])
    return (
        weights,
        torch.stack(losses).tolist(),
        1e3 * steady[len(steady) // 2],
        bool(graphed and graphed.failed),
        max(times),
    )


found = {"gpu": torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else "cpu"}
WANTED = [("MiniLM-L6", MINILM, "float32", None, CASES), ("BERT-base", {}, "bfloat16", torch.bfloat16, list(CASES)[:5])]
for size, shape, precision, autocast, cases in WANTED:
    for case in cases:
        try:
            without, losses, slow, _, _ = train(case, shape, autocast, False, steps=12)
            weights, replayed, fast, failed, longest = train(case, shape, autocast, True, steps=12)
            row = {"ms without": round(slow, 2), "ms with": round(fast, 2), "failed": failed}
            row |= {"longest step, s": round(longest, 2)}
            row |= {"largest difference of weights": float((without - weights).abs().max())}
            row |= {"losses without": losses, "losses with": replayed}
        except Exception as error:
            row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        found[f"{size} {precision} {case}"] = row
        print(size, precision, case, {k: v for k, v in row.items() if "losses" not in k}, flush=True)
        OUT.write_text(json.dumps(found, indent=1))
