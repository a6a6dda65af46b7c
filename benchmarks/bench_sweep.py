"""`python benchmarks/bench_sweep.py`: 1,000 points over the shipped trace on one process and on two."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from moesim.output import to_json
from moesim.plan.processes import Processes
from moesim.plan.results import read_rows
from moesim.plan.spec import Point, points_of
from moesim.plan.sweep import sweep

TRACE = Path(__file__).parents[1] / "traces" / "tiny-moe-8x16.parquet"
GRID = {
    "policy": ["LRU", "LFU", "Belady", "oracle", "static"],
    "machine": ["rtx-4090", "rtx-3090", "h100", "a100-80gb"],
    "slots_per_layer": [2, 3, 4, 5, 6, 8, 10, 12, 14, 16],
    "max_concurrency": [1, 2, 4, 8, 16],
}


def points(prompts: int | None, count: int) -> list[Point]:
    """Every (1000 / count)th point of the grid, over the trace's first requests or all of them."""
    base = {"trace": str(TRACE), "num_prompts": prompts}
    found = points_of({"base": base, "grid": GRID})
    return found[:: max(1, len(found) // count)][:count]


def seconds(asked: list[Point], jobs: int) -> tuple[float, dict[str, int]]:
    """Time of the whole sweep, processes started and results written, and how many rows have which status."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        sweep(asked, Path(folder), Processes(jobs, Path(folder)))
        took = time.perf_counter() - began
        status = [row["status"] for row in read_rows(Path(folder), ["status"])]
    return took, {name: status.count(name) for name in sorted(set(status))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-prompts", type=int, help="only the first N requests of the trace (of 336)")
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    asked = points(given.num_prompts, given.points)
    cases = []
    for jobs in given.jobs:
        took, status = seconds(asked, jobs)
        cases.append({"points": len(asked), "num_prompts": given.num_prompts, "jobs": jobs, "seconds": took, **status})
    speedup = cases[0]["seconds"] / cases[-1]["seconds"] if len(cases) > 1 else None
    print(to_json({"cases": cases, "speedup": speedup}))


if __name__ == "__main__":
    main()
