"""How much of a prediction is turned into copies before the router has spoken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moesim.errors import PolicyError, nearest

ORDERS = {
    "layer": "the nearest layer first, and in each layer the likeliest first",
    "linear": "probability x (1 - layers ahead / (layers + 1)), over all layers together (MoE-Infinity)",
    "inverse": "probability / layers ahead, over all layers together (fMoE)",
}


@dataclass(frozen=True)
class Prefetch:
    """per_layer: at most so many copies are queued for one layer of one step; None means all that are predicted.

    first_missing: look further ahead only while nothing nearer is missing (HOBBIT).
    pin: what is predicted may not be evicted before its layer is over, except by a demand that finds nothing else.
    order: which copies go first; the orders over all layers go by the map of the newest belief.
    bulk: the step begins when all that was asked for at its start has landed (SiDA's released code).
    latency_ns: from the trigger to the first copy; blocking: the step waits for it (MoE-Infinity), else it runs beside.
    own: an object with `prefetch(layer, experts, resident)`, which picks from what is believed (docs/add-a-policy.md).
    """

    per_layer: int | None = None
    first_missing: bool = False
    pin: bool = False
    latency_ns: int = 0
    blocking: bool = False
    order: str = "layer"
    bulk: bool = False
    own: Any = None

    def __post_init__(self) -> None:
        if self.own is not None and not hasattr(self.own, "prefetch"):
            raise PolicyError(f"prefetch {type(self.own).__name__} needs a method prefetch(layer, experts, resident)")
        if self.per_layer is not None and self.per_layer < 1:
            raise PolicyError(f"prefetch.per_layer {self.per_layer} must be at least 1; leave prediction out for none")
        if self.latency_ns < 0:
            raise PolicyError(f"prefetch.latency_ns {self.latency_ns} must be at least 0")
        if self.order not in ORDERS:
            raise PolicyError(f"prefetch.order: unknown order '{self.order}'{nearest(self.order, ORDERS)}")
        if self.order != "layer" and (self.first_missing or self.per_layer):
            raise PolicyError(
                f"prefetch.order {self.order} ranks all layers together; leave out per_layer, first_missing"
            )


@dataclass(frozen=True)
class Refresh:
    """Plan the whole cache anew every `period` requests, from the routing of earlier ones (eMoE, section 4).

    insensitive: tasks whose routing may be ignored (weight 0 in Eq. 2).
    expected_output: tokens a request of an unknown length is expected to generate (W_o of Eq. 2).
    predictor_params: size of the predictor network; its forward pass is what a plan costs.
    per_layer: the network is called once per layer instead of once for all of them.
    """

    needs: ClassVar[tuple[str, ...]] = ("task labels (else one task)",)

    period: int = 40
    insensitive: tuple[str, ...] = ()
    expected_output: int = 128
    predictor_params: float = 0.108e9
    per_layer: bool = False

    def __post_init__(self) -> None:
        if self.period < 1:
            raise PolicyError(f"refresh.period {self.period} must be at least 1 request")
        for name in ("expected_output", "predictor_params"):
            if getattr(self, name) < 0:
                raise PolicyError(f"refresh.{name} {getattr(self, name):g} must be at least 0")
