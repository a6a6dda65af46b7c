"""What a method does to a model or its routing before time exists. Pure: (Model, Trace) -> (Model, Trace)."""

from moesim.transforms.bits import MixedBits
from moesim.transforms.gating import SensitivityGating
from moesim.transforms.merge import Merge
from moesim.transforms.odp import DynamicPruning
from moesim.transforms.prune import Prune
from moesim.transforms.router import ReplacedRouter
from moesim.transforms.sequence_gate import SequenceGate
from moesim.transforms.task_experts import TaskExperts
from moesim.transforms.transform import Transform, Transformed, apply_all, calibration_rows

__all__ = [
    "DynamicPruning", "Merge", "MixedBits", "Prune", "ReplacedRouter", "SensitivityGating", "SequenceGate",
    "TaskExperts", "Transform", "Transformed", "apply_all", "calibration_rows",
]  # fmt: skip
