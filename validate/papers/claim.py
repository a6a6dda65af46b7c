"""A claim of a paper: what it reports, and how the simulator answers the same question."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

FACTOR = 1.25  # a ratio counts as reproduced within this factor, if its direction is right
NO_CHANGE = 0.05  # a reported ratio this near to 1 has no direction


class Fact(NamedTuple):
    """A value as its paper states it, under the labels of the collection it was read into."""

    system: str
    metric: str
    model: str
    gpu: str
    setting: str
    baseline: str
    value: float


@dataclass(frozen=True)
class Claim:
    """Every claim is a ratio: baseline over system, above 1 where the system is better.

    main: the one of its paper that the summary counts. predict: None where it is not set up; `why` says why not.
    kind: what the ratio is of: time, memory or operations. assumed: what stands in where the paper is silent. why: the
    reason, known or suspected, where the prediction is off.
    """

    system: str
    what: str
    reported: float
    facts: tuple[Fact, ...]
    predict: Callable[[], float] | None
    kind: str = "time"
    main: bool = False
    assumed: str = ""
    why: str = ""

    def answer(self) -> dict[str, Any]:
        """The claim beside its prediction, as plain values."""
        row: dict[str, Any] = {
            "system": self.system, "claim": self.what, "main": self.main, "kind": self.kind, "reported": self.reported,
        }  # fmt: skip
        if self.predict is None:
            return row | {"status": "not set up", "assumed": self.assumed, "reason": self.why}
        predicted = self.predict()
        ratio = predicted / self.reported
        right = self._direction(predicted)
        within = right and max(ratio, 1 / ratio) <= FACTOR
        status = "reproduced" if within else "off" if right else "wrong direction"
        row |= {"status": status, "predicted": predicted, "ratio": ratio, "direction_right": right, "within": within}
        return row | {"assumed": self.assumed, "reason": "" if within else self.why}

    def _direction(self, predicted: float) -> bool:
        if abs(self.reported - 1) <= NO_CHANGE:
            return max(predicted, 1 / predicted) <= FACTOR
        return (predicted - 1) * (self.reported - 1) > 0


def cut(percent: float) -> float:
    """Baseline over system, of a reduction stated in percent."""
    return 1 / (1 - percent / 100)


def mean(ratios: Sequence[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
