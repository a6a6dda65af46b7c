"""What a system believes about coming experts, when it knows it, and what finding out costs."""

from moesim.prediction.expert_maps import ExpertMaps
from moesim.prediction.history import History
from moesim.prediction.oracle import Oracle
from moesim.prediction.predictor import Beliefs, NoPrediction, Predictor
from moesim.prediction.request_counts import RequestCounts
from moesim.prediction.stacked_gates import StackedGates
from moesim.prediction.transitions import Transitions
from moesim.prediction.whole_layer import WholeLayer

__all__ = [
    "Beliefs",
    "ExpertMaps",
    "History",
    "NoPrediction",
    "Oracle",
    "Predictor",
    "RequestCounts",
    "StackedGates",
    "Transitions",
    "WholeLayer",
]
