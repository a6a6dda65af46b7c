"""What to do with a routed expert that is neither resident nor on its way."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.errors import PolicyError, nearest

RULES = {
    "fetch": "copy it to the device and compute there",
    "host": "compute it on the CPU, beside the device",
    "cheaper": "fetch or host, whichever would take less time alone",
    "reroute": "send the token to its next best resident expert",
    "skip": "leave it out of the token's mixture",
    "precision": "fetch it at high or low precision or skip it, by the weight of the experts ranked before it",
}
HIGH, LOW, SKIP = 2, 1, 0
PLACES = ("fetch", "host", "cheaper")  # rules that only say where an expert is computed


@dataclass(frozen=True)
class Misses:
    """keep=False: a fetched expert is used once from a scratch slot and does not enter the cache.

    thresholds: (T1, T2) of the rule `precision`; low_bits: bits per weight of the low-precision copies it fetches;
    low_share: share of the expert memory kept for them.
    prompts: the rule of passes with prompt tokens, where it is another one; both say only where experts are computed.
    prompts_from: it is the rule of passes with at least so many tokens instead, of whatever kind; 0: see above.
    host_below: `cheaper` is decided by the tokens of an expert alone: fewer than so many on the host; 0: by time.
    late_host: what is on its way is computed on the CPU where that takes less time than the rest of its copy and the
    kernel, each alone; the copy goes on.
    defer: so many host experts of a layer may finish during the next layer's attention (KTransformers).
    own: an object with `on_miss(miss)`, which decides in place of `rule` (docs/add-a-policy.md).
    """

    rule: str = "fetch"
    keep: bool = True
    thresholds: tuple[float, float] = (0.6, 0.9)
    low_bits: float | None = None
    low_share: float = 0.2
    prompts: str | None = None
    prompts_from: int = 0
    host_below: int = 0
    late_host: bool = False
    defer: int = 0
    own: Any = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise PolicyError(f"misses.rule: unknown rule '{self.rule}'{nearest(self.rule, RULES)}")
        if self.rule == "precision" and (self.low_bits is None or not 0 < self.low_share < 1):
            raise PolicyError("misses.rule precision needs low_bits and a low_share between 0 and 1")
        if self.low_bits is not None and not 0 < self.low_bits <= 64:
            raise PolicyError(f"misses.low_bits {self.low_bits} must lie above 0 and up to 64 bits per weight")
        if self.prompts is not None and not {self.rule, self.prompts} <= set(PLACES):
            raise PolicyError(
                f"misses.prompts {self.prompts} beside misses.rule {self.rule}: both must be one of {', '.join(PLACES)}"
            )
        if self.prompts_from < 0 or (self.prompts_from and self.prompts is None):
            raise PolicyError(f"misses.prompts_from {self.prompts_from}: a number of tokens, beside misses.prompts")
        if self.host_below < 0 or (self.host_below and "cheaper" not in (self.rule, self.prompts)):
            raise PolicyError(f"misses.host_below {self.host_below}: a number of tokens, beside misses.rule cheaper")
        if self.late_host and self.rule not in ("host", "cheaper"):
            raise PolicyError("misses.late_host needs experts on the host; set misses.rule to host or cheaper")
        if self.own is not None and (
            {self.rule, self.prompts or "fetch"} != {"fetch"} or not hasattr(self.own, "on_miss")
        ):
            raise PolicyError(
                f"misses {type(self.own).__name__} needs a method on_miss(miss), and misses.rule fetch beside it"
            )
        if self.defer < 0 or (self.defer and not self.may_host):
            raise PolicyError(
                f"misses.defer {self.defer} needs experts on the host; set misses.rule to host or cheaper"
            )
        low, high = self.thresholds
        if not 0 <= low <= high:
            raise PolicyError(f"misses.thresholds {low:g}, {high:g}: T1 must be at least 0 and T2 at least T1")

    @property
    def needs(self) -> tuple[str, ...]:
        found = {"precision": "gate weights (else ranks)", "reroute": "gate probabilities (else popularity)"}
        return (found[self.rule],) if self.rule in found else ()

    @property
    def changes_outputs(self) -> bool:
        return self.rule in ("reroute", "skip", "precision") or self.own is not None

    @property
    def may_host(self) -> bool:
        return not {self.rule, self.prompts}.isdisjoint(("host", "cheaper")) or self.own is not None

    def rule_of(self, prompts: bool, tokens: int) -> str:
        """The rule of a pass of so many tokens, some of which are of prompts or none."""
        other = tokens >= self.prompts_from if self.prompts_from else prompts
        return (other and self.prompts) or self.rule

    @property
    def substitutes(self) -> bool:
        """Absent experts are not waited for: the token goes elsewhere, or without."""
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


def precision_levels(weights: Sequence[float], thresholds: tuple[float, float]) -> list[int]:
    """HIGH, LOW or SKIP for each expert of a token, by rank (HOBBIT, section 3.2).

    An expert's unimportance is the normalised weight of all ranked before it, so the first is always HIGH.
    """
    total = sum(weights) or 1.0
    before, out = 0.0, []
    for weight in weights:
        score = before / total
        out.append(HIGH if score <= thresholds[0] else LOW if score <= thresholds[1] else SKIP)
        before += weight
    return out
