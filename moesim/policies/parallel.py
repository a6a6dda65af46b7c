"""How several GPUs share a model whose experts are all resident."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import PolicyError, nearest

ATTENTION = {
    "tensor": "each GPU has some of the heads; two all-reduces a layer",
    "data": "each GPU has whole sequences; tokens travel to experts and back",
}
EXPERTS = {
    "tensor": "each GPU has a slice of every expert",
    "expert": "each GPU has whole experts",
    "gather": "each GPU has a slice of every expert, and gathers a layer's before it computes its own tokens",
    "either": "of `tensor` and `gather`, in every pass, what moves fewer bytes",
}
PLACEMENTS = {
    "contiguous": "in order: the first experts on the first GPU",
    "balanced": "DeepSeek's EPLB: the most loaded experts get replicas, and GPUs equal loads",
    "exact": "the least possible load of the busiest GPU, by integer program; no replicas",
    "given": "as `layout` says, from a file of a serving engine",
}


@dataclass(frozen=True)
class Parallel:
    """Of no effect on one GPU. The placement and what follows it matter only where GPUs have whole experts.

    shares: of every expert's hidden dimension by GPU, in any unit; (): by their speed. Where a GPU computes its own
    tokens (`gather`, `either`) it also takes that share of the sequences.

    redundant: replicas a layer has beyond one of each expert; None: an eighth of the experts, or as few more as make
    the GPUs' numbers equal. interval: passes after which `balanced` places anew by the loads since; 0: once, by the
    calibration requests. overlap: two halves of a batch take turns, so that one exchanges while the other computes.
    layout: of `given`: by MoE layer, the expert in each slot, GPU after GPU.
    """

    attention: str = "tensor"
    experts: str = "tensor"
    placement: str = "contiguous"
    redundant: int | None = 0
    interval: int = 0
    overlap: bool = False
    layout: tuple[tuple[int, ...], ...] = ()
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        known = {"attention": ATTENTION, "experts": EXPERTS, "placement": PLACEMENTS}
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise PolicyError(f"parallel.{name}: unknown '{value}'{nearest(str(value), values)}")
        if (self.redundant or 0) < 0 or self.interval < 0:
            raise PolicyError("parallel.redundant and parallel.interval must not be negative")
        if self.gathers and (self.attention != "data" or self.overlap):
            raise PolicyError(
                f"parallel.experts {self.experts} is for GPUs that have sequences of their own; set "
                "parallel.attention=data and parallel.overlap=false"
            )
        if self.shares and (self.experts == "expert" or self.attention != "data" or min(self.shares) <= 0):
            raise PolicyError(
                "parallel.shares are numbers above 0, one for each GPU, of sliced experts; set parallel.attention=data "
                "and parallel.experts=tensor, gather or either"
            )
        if self.placement != "contiguous" and self.experts != "expert":
            raise PolicyError(f"parallel.placement {self.placement} places whole experts; set parallel.experts=expert")
        if (self.placement == "given") != bool(self.layout):
            raise PolicyError("parallel.placement=given and parallel.layout go together; --placement FILE sets both")
        if self.placement != "balanced" and (self.redundant or self.interval):
            raise PolicyError("parallel.redundant and parallel.interval go with parallel.placement=balanced")

    @property
    def gathers(self) -> bool:
        """A GPU may need all of a layer's experts at once."""
        return self.experts in ("gather", "either")

    @property
    def sliced(self) -> bool:
        return self.experts != "expert"

    def slots(self, experts: int, gpus: int) -> int:
        """Experts a layer holds on all GPUs together, replicas included; as many on each.

        Raises PolicyError where that cannot be.
        """
        if self.layout:
            return len(self.layout[0])
        least = -(-experts // 8) if self.redundant is None else self.redundant
        if self.placement != "balanced":
            least = 0
        total = experts + least
        if total % gpus:
            if self.redundant is not None:
                raise PolicyError(
                    f"{experts} experts and {least} replicas do not spread evenly over {gpus} GPUs; set "
                    f"parallel.placement=balanced and parallel.redundant={-experts % gpus}, or parallel.experts=tensor"
                )
            total += -total % gpus
        return total
