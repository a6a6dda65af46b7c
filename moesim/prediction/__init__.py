"""What a system believes about coming experts, when it knows it, and what finding out costs."""

from moesim.prediction.history import History
from moesim.prediction.oracle import Oracle
from moesim.prediction.predictor import Beliefs, NoPrediction, Predictor
from moesim.prediction.transitions import Transitions

__all__ = ["Beliefs", "History", "NoPrediction", "Oracle", "Predictor", "Transitions"]
