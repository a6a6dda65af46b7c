"""Models, machines, routing and runs that the set-ups share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from moesim.machine import Machine
from moesim.machine_file import changed
from moesim.model import Model, load_model
from moesim.question import Question, Scene, compose, run
from moesim.systems import System
from moesim.trace import Trace
from moesim.trace.assumed import distinct_routing, local_routing

MIXTRAL, PHI, QWEN = "mixtral-8x7b-v0.1", "phi-3.5-moe-instruct", "qwen1.5-moe-a2.7b"

# Share of the first of Mixtral's two gate weights, by quantile: 0.658 in the median (mean of MC's 32 medians of w1/w0,
# 0.52); 34 % of tokens at most 0.6, 94 % at most 0.9 (HOBBIT: 67 / 30 / 3 % of choices high, low, skipped).
FIRST_GATE = ((0.0, 0.5), (0.34, 0.6), (0.5, 0.658), (0.94, 0.9), (1.0, 1.0))
# Systems and baselines that run in Hugging Face transformers: one expert after the other, every kernel launched alone.
TRANSFORMERS = ("kernel=loop", "graph=false")
GATES = "gate weights drawn from quantiles that HOBBIT and MC publish for Mixtral"
LOCALITY = "routing drawn with the locality of gpt-oss-20b"


@cache
def model(name: str) -> Model:
    return load_model(name)


@cache
def machine(base: str, **changes: Any) -> Machine:
    """A machine of the catalogue with what a paper states of its own changed (`host_memory` for `host.memory`)."""
    return changed(base, {key.replace("__", "."): value for key, value in changes.items()})


@cache
def local(served: Model, requests: int, prompt: int, output: int) -> Trace:
    """Routing with locality, which caches live by, and gate weights where two experts share a token."""
    trace = local_routing(served, requests, prompt, output)
    return with_gates(trace) if served.top_k == 2 else trace


@cache
def plain(served: Model, requests: int, prompt: int, output: int) -> Trace:
    """Routing without locality: enough where every expert is resident."""
    trace = distinct_routing(served, requests, prompt, output)
    return with_gates(trace) if served.top_k == 2 else trace


def with_gates(trace: Trace) -> Trace:
    quantile, share = zip(*FIRST_GATE, strict=True)
    first = np.interp(np.random.default_rng(0).random(trace.experts.shape[:2]), quantile, share)
    return replace(trace, weights=np.stack([first, 1 - first], axis=2).astype(np.float16))


@cache
def metrics(
    policy: str | System, trace: Trace, served: Model, box: Machine, settings: tuple[str, ...] = (), **question: Any
) -> dict[str, Any]:
    """Metrics of one run, memory ledger included. Raises RuntimeError where the simulator says that it cannot run."""
    asked = Question(model=served, machine=box, **question)
    summary = run(trace, policy, asked, settings, anchors=False, shown=False).summary
    if not summary["metrics"]:
        raise RuntimeError(f"{policy}: {summary['status']}: {summary['status_reason']}")
    return dict(summary["metrics"]) | {"memory": summary["memory"], "bottleneck": summary["bottleneck"]}


def gpu_bytes(policy: str, trace: Trace, served: Model, box: Machine, **question: Any) -> int:
    """What the ledger counts on the GPU, without what is free or held in reserve; nothing is run."""
    system = compose(policy)
    ledger = Scene(trace, Question(model=served, machine=box, **question)).under(system).ledger(system)
    return sum(size for name, size in ledger.gpu.items() if name not in ("free", "fragmentation reserve"))
