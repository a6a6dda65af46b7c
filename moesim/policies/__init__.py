"""The choices a serving system makes. They decide; they hold no clock and start no event."""

from moesim.policies.capacity import Capacity, Even, ExpectedLoads, WholeLayers, split_by_layer
from moesim.policies.eviction import BELADY, FIFO, HOT, LFU, LRU, PLAN, RANDOM, Eviction
from moesim.policies.misses import HIGH, LOW, SKIP, Misses, cheaper, precision_levels, reroute
from moesim.policies.parallel import Parallel
from moesim.policies.placement import Placement
from moesim.policies.prefetch import Prefetch, Refresh
from moesim.policies.scheduling import FCFS, Candidate, GreedySLO, Scheduling
from moesim.policies.transfer import Transfer

__all__ = [  # noqa: RUF022
    "BELADY", "FCFS", "FIFO", "HOT", "LFU", "LRU", "PLAN", "RANDOM",
    "Candidate", "Capacity", "Even", "Eviction", "ExpectedLoads",
    "GreedySLO", "Misses", "Parallel", "Placement", "Prefetch", "Refresh", "Scheduling", "Transfer", "WholeLayers",
    "HIGH", "LOW", "SKIP", "cheaper", "precision_levels", "reroute", "split_by_layer",
]  # fmt: skip
