"""Expert placements in files of serving engines: EPLB maps, TensorRT-LLM's load balancer, llama.cpp's overrides.

A placement is an array [MoE layers, slots] of expert numbers; GPU g has slots g * n to (g + 1) * n, as vLLM, SGLang and
TensorRT-LLM number physical experts. Formats: `physical_to_logical_map`, `logical_to_physical_map` and
`logical_replica_count` of vLLM's and SGLang's EPLB state; `initial_global_assignments`, `num_slots` and
`layer_updates_per_iter` of TensorRT-LLM's MoE load balancer; tensor names of llama.cpp's `--override-tensor`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import PolicyError
from moesim.policies.balance import Slots
from moesim.systems.system import System
from moesim.trace import Trace

MAX_BYTES = 1 << 26
EPLB_NAMES = ("physical_to_logical_map", "phy2log")


def read_placement(path: Path, moe_layers: Sequence[int], experts: int, gpus: int) -> Slots:
    """The placement of an EPLB map (.json) or of TensorRT-LLM's YAML, for a model with these MoE layers.

    A map with a row for every layer of the model, dense ones included, is taken at the MoE layers. Raises PolicyError
    by file, layer, value and rule.
    """
    data = _load(path)
    if isinstance(data, dict) and "initial_global_assignments" in data:
        rows = _assignments(path, data, moe_layers)
    elif isinstance(data, dict) and any(name in data for name in EPLB_NAMES):
        rows = _by_layer(path, next(data[name] for name in EPLB_NAMES if name in data), moe_layers)
    elif isinstance(data, list):
        rows = _by_layer(path, data, moe_layers)
    else:
        raise PolicyError(
            f"{path}: neither physical_to_logical_map (EPLB) nor initial_global_assignments (TensorRT-LLM); "
            "'moesim placement export' writes both"
        )
    return _checked(path, rows, moe_layers, experts, gpus)


def placed(system: System, path: Path, trace: Trace, gpus: int) -> System:
    """`system` with whole experts where the file says. Raises PolicyError where that makes no sense."""
    if gpus < 2 or not system.all_resident:
        raise PolicyError(
            f"--placement {path}: places experts on the GPUs of one machine, all resident; take a machine such as "
            f"8xh200 and --policy EPLB, not {system.name} on {gpus} GPU{'s'[: gpus > 1]}"
        )
    if system.parallel.interval:
        raise PolicyError(f"--placement {path}: {system.name} would place anew; set parallel.interval=0")
    slots = read_placement(path, trace.info.moe_layers, trace.info.experts, gpus)
    layout = tuple(tuple(row) for row in slots.tolist())
    parallel = replace(system.parallel, experts="expert", placement="given", redundant=0, layout=layout)
    return replace(system, parallel=parallel, notes=(*system.notes, f"experts are placed as {path.name} says"))


def _load(path: Path) -> Any:
    import yaml

    try:
        if path.stat().st_size > MAX_BYTES:
            raise PolicyError(f"{path}: larger than {MAX_BYTES >> 20} MiB, so it is no placement")
        text = path.read_text(encoding="utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.load(text, loader)
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise PolicyError(f"{path}: not JSON or YAML ({str(error).splitlines()[0]})") from None


def _assignments(path: Path, data: dict[str, Any], moe_layers: Sequence[int]) -> list[Any]:
    given = data["initial_global_assignments"]
    if not isinstance(given, dict):
        raise PolicyError(f"{path}: initial_global_assignments must map layer numbers to lists of experts")
    missing = [layer for layer in moe_layers if layer not in given]
    if missing:
        raise PolicyError(f"{path}: layer {missing[0]} has no assignment; the model's MoE layers need one each")
    slots = data.get("num_slots")
    for layer in moe_layers:
        if slots is not None and isinstance(given[layer], list) and len(given[layer]) != slots:
            raise PolicyError(f"{path}: layer {layer}: {len(given[layer])} experts, but num_slots is {slots}")
    return [given[layer] for layer in moe_layers]


def _by_layer(path: Path, rows: Any, moe_layers: Sequence[int]) -> list[Any]:
    if not isinstance(rows, list) or len(rows) not in (len(moe_layers), moe_layers[-1] + 1):
        count = len(rows) if isinstance(rows, list) else 0
        raise PolicyError(f"{path}: {count} layers, but the model has {len(moe_layers)} MoE layers; one list for each")
    return rows if len(rows) == len(moe_layers) else [rows[layer] for layer in moe_layers]


def _checked(path: Path, rows: list[Any], moe_layers: Sequence[int], experts: int, gpus: int) -> Slots:
    for layer, row in zip(moe_layers, rows, strict=True):
        where = f"{path}: layer {layer}"
        if not isinstance(row, list) or not all(type(e) is int for e in row):
            raise PolicyError(f"{where}: must be a list of expert numbers")
        if len(row) != len(rows[0]) or not row or len(row) % gpus:
            raise PolicyError(f"{where}: {len(row)} slots; every layer must have as many, divisible by {gpus} GPUs")
        strange = [e for e in row if not 0 <= e < experts]
        if strange:
            raise PolicyError(f"{where}: expert {strange[0]}, but the model has {experts} (0 to {experts - 1})")
        absent = set(range(experts)) - set(row)
        if absent:
            raise PolicyError(f"{where}: expert {min(absent)} is on no GPU; every expert needs a slot")
    return np.array(rows, dtype=np.int64)


# -- writing ------------------------------------------------------------------------------------------------------


def eplb_json(slots: Slots, experts: int, moe_layers: Sequence[int], gpus: int, source: dict[str, Any]) -> str:
    """EPLB state by its names; -1 fills where an expert has fewer replicas than the one with most."""
    layers = len(slots)
    count = np.stack([np.bincount(row, minlength=experts) for row in slots])
    physical = np.full((layers, experts, int(count.max())), -1)
    for layer, row in enumerate(slots.tolist()):
        seen = [0] * experts
        for slot, expert in enumerate(row):
            physical[layer, expert, seen[expert]] = slot
            seen[expert] += 1
    lines = {
        "physical_to_logical_map": _lines(slots.tolist()),
        "logical_to_physical_map": _lines(physical.tolist()),
        "logical_replica_count": _lines(count.tolist()),
    }
    head = {"moe_layers": list(moe_layers), "num_gpus": gpus, "moesim": source}
    body = [f'"{name}": {text}' for name, text in lines.items()]
    body += [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    return "{\n" + ",\n".join(body) + "\n}\n"


def _lines(rows: list[Any]) -> str:
    """A line per layer."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"


def trtllm_yaml(slots: Slots, moe_layers: Sequence[int], source: dict[str, Any], updates: int = 0) -> str:
    """TensorRT-LLM's `moe_config.load_balancer` file; updates: layers placed anew in each iteration, 0 for none."""
    lines = [f"# {key}: {value}" for key, value in source.items()]
    lines += [f"num_slots: {slots.shape[1]}", f"layer_updates_per_iter: {updates}", "initial_global_assignments:"]
    lines += [f"  {layer}: {json.dumps(row)}" for layer, row in zip(moe_layers, slots.tolist(), strict=True)]
    return "\n".join(lines) + "\n"


def llamacpp_override(on_cpu: Sequence[int]) -> str:
    """llama.cpp's `-ot` that keeps the experts of these blocks on the CPU; shared experts (`_shexp`) are not matched.

    Raises PolicyError where there are none.
    """
    if not on_cpu:
        raise PolicyError("llama.cpp keeps every layer's experts on the GPU here, so there is nothing to override")
    blocks = "|".join(str(block) for block in on_cpu)
    return f"blk\\.({blocks})\\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
