"""How fast the compiled engine is: `python benchmarks/engine.py [--json] [CASE ...]`.

Every case runs in a process of its own, so that its memory is its own. Figures are of this machine at this moment; the
ratios, against the event engine and against one numpy.bincount over the same ids, are taken in the same process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# case: model, machine, tokens, sequences at once, tokens for the event engine
DECODE = {
    "mixtral-b1": ("mixtral-8x7b", "rtx-4090", 100_000, 1, 200),
    "mixtral-b32": ("mixtral-8x7b", "rtx-4090", 1_600_000, 32, 1_600),
    "deepseek-v3-b1": ("deepseek-v3", "h200", 20_000, 1, 40),
    "deepseek-v3-b32": ("deepseek-v3", "h200", 160_000, 32, 128),
}
SERVING = "serving-qwen3"
LENGTHS = {f"mixtral-b1-{n // 1000}k": n for n in (10_000, 100_000, 1_000_000)}  # cost per token against length
OUTPUT = 1000  # tokens of each request that only decodes
RESIDENT = 0.5  # share of the experts that fit


def routing(model: Any, tokens: int, requests: int, prompt: int, seed: int = 0) -> Any:
    """Drawn routing with a skew and some reuse of the token before: decode only, or `prompt` rows first."""
    import numpy as np

    from moesim.trace import DECODE as DECODING
    from moesim.trace import PREFILL, Requests, Trace, TraceInfo

    rng = np.random.default_rng(seed)
    layers, experts, k = len(model.moe_layers), model.experts, model.top_k
    ids = np.empty((tokens, layers, k), dtype=np.int16)
    taste = rng.gumbel(size=(layers, experts)).astype(np.float32)
    for first in range(0, tokens, 4096):
        part = ids[first : first + 4096]
        noise = rng.gumbel(size=(len(part), layers, experts)).astype(np.float32)
        part[:] = np.argpartition(-(taste + noise), k - 1, axis=2)[:, :, :k]
    keep = rng.random((tokens, layers)) < 0.3
    keep[0] = False
    for row in range(1, tokens):
        ids[row, keep[row]] = ids[row - 1, keep[row]]
    request = np.arange(tokens) * requests // tokens
    position = np.arange(tokens) - np.searchsorted(request, request)
    return Trace(
        info=TraceInfo(model.name, experts, k, model.moe_layers, provenance="synthetic"),
        requests=Requests(
            tuple(f"r{i}" for i in range(requests)), ("",) * requests, np.full(requests, max(prompt, 1), dtype=np.int32)
        ),
        experts=ids,
        request=request.astype(np.int32),
        phase=np.where(position < prompt, PREFILL, DECODING).astype(np.uint8),
        position=position.astype(np.int32),
    )


def decode_case(model_name: str, machine_name: str, tokens: int, sequences: int, few: int) -> dict[str, float]:
    """LRU per layer over half of the experts, the next layer's prefetched as a 70 % oracle names them; records on."""
    from dataclasses import replace

    from moesim.costs.fitted import costs_of
    from moesim.costs.table import CostTable
    from moesim.engine.serve import Limits
    from moesim.engine.simulate import Setting, simulate
    from moesim.machine import load_machine
    from moesim.model import load_model
    from moesim.prediction import Oracle
    from moesim.systems import load_system
    from moesim.workload import from_trace

    model, machine = load_model(model_name), load_machine(machine_name)
    system = replace(load_system("LRU"), predictor=Oracle(0.7, distance=1))

    def setting(count: int) -> Setting:
        trace = routing(model, count, max(count // OUTPUT, sequences), 0)
        table = CostTable(model, machine, costs_of(machine))
        slots = int(RESIDENT * model.experts)
        size = sum(table.expert_bytes(layer) for layer in range(trace.layers))
        limits = Limits(1 << 30, sequences, 8192, 0, 1 << 60)
        return Setting(trace, table, from_trace(trace), limits, slots * size, 0, 0, 0)

    simulate(setting(4 * sequences), system, detail=True, engine="compiled")  # compiled code is loaded
    scene = setting(tokens)
    beliefs = system.predictor.predict(scene.trace, 0)
    start = time.perf_counter()
    simulate(scene, system, detail=True, beliefs=beliefs, engine="compiled")
    compiled = tokens / (time.perf_counter() - start)
    peak = peak_mb()
    scene_ids = scene.trace.experts
    counting = tokens / bincount_seconds(scene_ids, model.experts)
    small = setting(few)
    start = time.perf_counter()
    simulate(small, system, detail=True, engine="events")
    events = few / (time.perf_counter() - start)
    return {
        "tokens_per_s": compiled,
        "over_events": compiled / events,
        "over_bincount": counting / compiled,
        "peak_mb": peak,
    }


def bincount_seconds(ids: Any, experts: int) -> float:
    """One pass over all ids, told apart by layer."""
    import numpy as np

    keys = (ids + np.arange(ids.shape[1], dtype=np.int32)[:, None] * experts).ravel()
    start = time.perf_counter()
    np.bincount(keys)
    return time.perf_counter() - start


def serving_case() -> dict[str, float]:
    """10,000 requests, Poisson; every one takes its rows from a pool of 64 drawn ones."""
    import numpy as np

    from moesim.costs.fitted import costs_of
    from moesim.costs.table import CostTable
    from moesim.engine.serve import Limits
    from moesim.engine.simulate import Setting, simulate
    from moesim.machine import load_machine
    from moesim.model import load_model
    from moesim.systems import load_system
    from moesim.workload import Request, Workload, with_arrivals

    model, machine = load_model("qwen3-30b-a3b"), load_machine("h100")
    pool, prompt, output = 64, 512, 128
    trace = routing(model, pool * (prompt + output), pool, prompt)
    own = np.arange(pool * (prompt + output)).reshape(pool, -1)
    rng = np.random.default_rng(1)
    requests = tuple(
        Request(f"r{i}", "", 0, prompt, own[j, :prompt], own[j, prompt : prompt + output - 1])
        for i, j in enumerate(rng.integers(pool, size=10_000).tolist())
    )
    workload = with_arrivals(Workload(requests, "", "drawn"), 6.45, 1.0, 1)
    table = CostTable(model, machine, costs_of(machine), offloaded=False)
    system = load_system("all-resident")
    total = sum(table.expert_bytes(layer) for layer in range(trace.layers)) * model.experts
    limits = Limits(1 << 30, 256, 8192, 0, machine.gpu.memory_bytes - total)

    def run(count: int, engine: str) -> float:
        part = Workload(workload.requests[:count], "", "drawn")
        start = time.perf_counter()
        simulate(Setting(trace, table, part, limits, total, 0, 0, 0), system, detail=True, engine=engine)
        return count * output / (time.perf_counter() - start)

    compiled = run(10_000, "compiled")
    peak = peak_mb()
    events = run(20, "events")
    rows = np.concatenate([r.prefill for r in requests[:200]] + [r.decode for r in requests[:200]])
    counting = 200 * output / bincount_seconds(trace.experts[rows], model.experts)
    return {
        "tokens_per_s": compiled,
        "over_events": compiled / events,
        "over_bincount": counting / compiled,
        "peak_mb": peak,
    }


def run_case(name: str) -> dict[str, Any]:
    began = time.perf_counter()
    if name == SERVING:
        figures = serving_case()
    elif name in LENGTHS:
        figures = decode_case("mixtral-8x7b", "rtx-4090", LENGTHS[name], 1, 40)
    else:
        figures = decode_case(*DECODE[name])
    return {"case": name, **figures, "process_s": time.perf_counter() - began}


def peak_mb() -> float:
    """Of this process so far: the drawn trace, the simulator, its records."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", help=f"of {', '.join([*DECODE, SERVING, *LENGTHS])}; default: five")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(run_case(options.alone)))
        return
    cases = []
    for name in options.case or [*DECODE, SERVING]:
        out = subprocess.run([sys.executable, __file__, "--alone", name], check=True, stdout=subprocess.PIPE, text=True)
        cases.append(json.loads(out.stdout))
        if not options.json:
            print("  ".join(f"{k} {v:,.4g}" if isinstance(v, float) else v for k, v in cases[-1].items()))
    if options.json:
        print(json.dumps({"cases": cases}, indent=2))


if __name__ == "__main__":
    main()
