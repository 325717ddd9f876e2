"""PyTorch's exact search, for `gpu_check timings --torch` (src/bin/gpu_check/torch.rs).

Takes one JSON object as its argument and prints one. Rows lie on the card in f16; a search is a
product in f16 and `topk`, from probes in main memory to row numbers there.
"""

import json
import sys
import time

import torch

asked = json.loads(sys.argv[1])
device = "cuda" if torch.cuda.is_available() else "cpu"
began = time.perf_counter()


def read(name, count, kind):
    """A file of rows of numbers."""
    return torch.from_file(asked[name], shared=True, size=count * asked["dim"], dtype=kind).view(count, asked["dim"])


rows = read("rows", asked["count"], torch.float16).to(device)
probes = read("probes", asked["probe_count"], torch.float32)


def search(count):
    """The best rows of the first probes."""
    scores = probes[:count].to(device, torch.float16) @ rows.T
    return torch.topk(scores, asked["k"]).indices.cpu()


lines = []
for batch in asked["batches"]:
    if time.perf_counter() - began > asked["seconds_max"]:
        break
    search(batch)
    calls, turn = [], time.perf_counter()
    while len(calls) < 3 or time.perf_counter() - turn < asked["seconds"]:
        start = time.perf_counter()
        search(batch)
        calls.append(1e3 * (time.perf_counter() - start))
    calls.sort()
    lines.append({"probes": batch, "best_ms": calls[0], "median_ms": calls[len(calls) // 2]})

name = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
found = search(asked["check"]).tolist()
print(json.dumps({"version": torch.__version__, "device": name, "lines": lines, "found": found}))
