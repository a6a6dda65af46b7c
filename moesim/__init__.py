"""moesim: what an MoE model will do on a machine, before anyone buys or reloads anything.

moesim.replay("trace.parquet", "eMoE", slots_per_layer=8) -> Run
moesim.load_model(name), moesim.load_machine(name), moesim.load_system(name), moesim.read_trace(path)
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0.dev0"

_NAMES = {
    "replay": "moesim.question",
    "Run": "moesim.question",
    "load_model": "moesim.model",
    "load_machine": "moesim.machine",
    "load_system": "moesim.systems",
    "read_trace": "moesim.trace.io:read",
}
__all__ = [*_NAMES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    # Loaded on first use: `moesim --help` must not wait for numpy and pyarrow.
    from importlib import import_module

    if name not in _NAMES:
        raise AttributeError(f"module 'moesim' has no attribute '{name}'")
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(import_module(module), attribute or name)
