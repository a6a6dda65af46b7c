"""What to do with a routed expert that is neither resident nor on its way."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from moesim.errors import PolicyError, nearest

RULES = {
    "fetch": "copy it to the device and compute there",
    "host": "compute it on the CPU, beside the device",
    "cheaper": "fetch or host, whichever would take less time alone",
    "reroute": "send the token to its next best resident expert",
    "skip": "leave it out of the token's mixture",
}


@dataclass(frozen=True)
class Misses:
    """`keep=False`: a fetched expert is used once from a scratch slot and does not enter the cache."""

    rule: str = "fetch"
    keep: bool = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise PolicyError(f"misses.rule: unknown rule '{self.rule}'{nearest(self.rule, RULES)}")

    @property
    def changes_outputs(self) -> bool:
        return self.rule in ("reroute", "skip")


def cheaper(fetch_ns: int, host_ns: int) -> str:
    """Fetch or host, by time alone; the CPU wins a tie because it leaves the link free."""
    return "host" if host_ns <= fetch_ns else "fetch"


def reroute(chosen: Sequence[int], resident: Container[int], preference: Iterable[int]) -> list[int]:
    """`chosen`, by rank, with every absent expert replaced by the most preferred resident one not yet used; -1 if none.

    eMoE, section 4.4: the next expert in gate order that is on the device.
    """
    used = {e for e in chosen if e in resident}
    candidates = iter(preference)
    out = []
    for expert in chosen:
        if expert < 0 or expert in used:
            out.append(expert)
            continue
        substitute = next((e for e in candidates if e in resident and e not in used), -1)
        used.add(substitute)
        out.append(substitute)
    return out
