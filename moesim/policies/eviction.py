"""Which expert leaves when a slot is needed: the one with the lowest score, never one in use or on its way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesim.errors import PolicyError, nearest

# Every feature is a number per resident expert; larger means more worth keeping.
FEATURES = {
    "lru": "logical time of the last use (one tick per expert looked up, in rank order)",
    "lfu": "uses since it was brought in",
    "count": "uses since the replay began, kept across evictions",
    "fifo": "order in which it was brought in",
    "hot": "share of the calibration requests' choices in its layer",
    "belady": "next use, sooner is larger; looks ahead",
    "plan": "value the last plan gave it (Refresh); 0 where no plan names it",
    "random": "a seeded hash, drawn anew for every eviction",
    "recency": "step of the last use over steps so far, in this sequence (HOBBIT's R/T)",
    "frequency": "uses over steps so far, in this sequence (HOBBIT's F/T)",
    "high": "uses at high precision over steps so far, in this sequence (HOBBIT's H/T)",
    "near": "1 - layers until its layer comes round again / layers (HOBBIT's FLD)",
    "prob": "probability in the newest belief about its layer; 0 where there is none",
}
ALIASES = {"fld": "near", "lhu": "high"}  # HOBBIT's names
# These change without the expert being touched, so candidates are scored anew for every victim.
CHANGING = {"random", "recency", "frequency", "high", "near", "prob"}
LARGE = ("lru", "lfu", "count", "fifo", "belady", "plan", "random")  # all others lie between 0 and 1
SIGNED = ("lru", "belady")
COMBINATIONS = ("sum", "product")
SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Eviction:
    """Score = sum of weight x feature, or product of feature ** weight; ties go to the least recently used, then to
    the lower (layer, expert).

    scope: what competes for a slot: the experts of one layer, or all of them.
    per_sequence: uses are forgotten when a new request is admitted.
    window: steps that `belady` looks ahead; 0 = to the end.
    own: an object with `score(expert)` or `victim(experts)`, which decides in place of `score` (docs/add-a-policy.md).
    """

    score: tuple[tuple[str, float], ...] = (("lru", 1.0),)
    scope: str = "layer"
    combine: str = "sum"
    per_sequence: bool = False
    window: int = 0
    own: Any = None

    def __post_init__(self) -> None:
        if self.own is not None:
            if not (hasattr(self.own, "score") or hasattr(self.own, "victim")):
                raise PolicyError(f"eviction {type(self.own).__name__} needs a method score(expert) or victim(experts)")
            object.__setattr__(self, "score", ())
        elif not self.score:
            raise PolicyError("eviction.score is empty; name at least one feature, such as lru")
        renamed = tuple((ALIASES.get(feature, feature), weight) for feature, weight in self.score)
        object.__setattr__(self, "score", renamed)
        for feature, _ in self.score:
            if feature not in FEATURES:
                hint = nearest(feature, [*FEATURES, *ALIASES])
                raise PolicyError(f"eviction.score: unknown feature '{feature}'{hint}")
        if self.combine not in COMBINATIONS:
            raise PolicyError(f"eviction.combine '{self.combine}' must be one of {', '.join(COMBINATIONS)}")
        if self.combine == "product" and any(weight < 0 or feature in SIGNED for feature, weight in self.score):
            raise PolicyError(
                f"eviction.combine product takes weights of at least 0, and neither {' nor '.join(SIGNED)}, which "
                "may be negative; set eviction.combine=sum"
            )
        if self.window < 0 or (self.window and not self.looks_ahead):
            raise PolicyError(f"eviction.window {self.window} must be at least 0, and needs the feature belady")
        if self.scope not in SCOPES:
            raise PolicyError(f"eviction.scope '{self.scope}' must be one of {', '.join(SCOPES)}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("the future",) if self.looks_ahead else ()

    @property
    def changing(self) -> bool:
        return self.own is not None or self.window > 0 or any(feature in CHANGING for feature, _ in self.score)

    @property
    def counts(self) -> bool:
        """Whether uses must be counted across evictions."""
        return self.own is not None or any(feature == "count" for feature, _ in self.score)

    @property
    def outweighed(self) -> str:
        """A remark where a sum adds large features to shares, or ''."""
        names = [feature for feature, weight in self.score if weight]
        large, shares = [n for n in names if n in LARGE], [n for n in names if n not in LARGE]
        if self.combine == "product" or not (large and shares):
            return ""
        return (
            f"eviction.score: {', '.join(large)} may be much larger than {', '.join(shares)}, which lies between 0 and "
            "1 and may only decide ties; recency and frequency are such shares of lru and lfu"
        )

    @property
    def looks_ahead(self) -> bool:
        return any(feature == "belady" for feature, _ in self.score)


LRU = Eviction((("lru", 1.0),))
LFU = Eviction((("lfu", 1.0),))
FIFO = Eviction((("fifo", 1.0),))
HOT = Eviction((("hot", 1.0),))
BELADY = Eviction((("belady", 1.0),))
RANDOM = Eviction((("random", 1.0),))
PLAN = Eviction((("plan", 1.0),))
