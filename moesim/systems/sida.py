"""SiDA-MoE (arXiv 2310.18859): a network replaces the routers and knows every layer's experts before the batch runs."""

from __future__ import annotations

from moesim.errors import PolicyError
from moesim.policies import FIFO, Eviction, Prefetch, Transfer
from moesim.prediction import Oracle
from moesim.systems.system import Quality, System
from moesim.transforms import ReplacedRouter


def sida(variant: str = "paper", top_k: int = 1, accuracy: float = 0.95) -> System:
    """Experts are copied in layer by layer as the hash function names them; a wrong one costs accuracy, never a stall.

    variant: `paper` overlaps copies with the layers before, first in first out; `code` moves everything before the
        batch starts, and what leaves is copied back (the released `move_experts`).
    top_k: experts the hash names per token, 1 or 3 in the paper. accuracy: of each, stated.
    """
    if variant not in ("paper", "code"):
        raise PolicyError(f"SiDA variant '{variant}' must be paper (overlapped, first in first out) or code (bulk)")
    notes: tuple[str, ...] = (
        "the next prompt's experts are not moved while this one runs: a step's experts are known when it starts",
        "the hash function runs beside inference, and its time is not counted, as the paper finds it to be hidden",
    )
    if variant == "code":
        notes += ("experts are moved for every step; the released code moves them for groups of 64 samples",)
    return System(
        "SiDA" if variant == "paper" else "SiDA-code",
        eviction=Eviction(FIFO.score, scope="global"),
        predictor=Oracle(distance=0, wraps=False),
        prefetch=Prefetch(bulk=variant == "code"),
        transfer=Transfer(write_back=variant == "code"),
        transforms=(ReplacedRouter(top_k, accuracy),),
        source="arXiv 2310.18859 and its released code",
        quality=Quality(
            "97.5 to 99.0 % (Switch-base-8) and 92.6 to 93.0 % (base-128) of the fine-tuned accuracy on SST2, MRPC and "
            "MultiRC; C4 perplexity 18.49 instead of 6.68 (base-8)",
            "arXiv 2310.18859",
        ),
        notes=notes,
    )
