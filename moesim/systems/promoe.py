"""ProMoE (arXiv 2410.22134): a small network per layer on the CPU predicts ahead; copies go matrix by matrix."""

from __future__ import annotations

from moesim.policies import Prefetch, Transfer
from moesim.prediction import Oracle
from moesim.systems.system import System


def promoe(accuracy: float = 0.9, stride: int = 1, predict_ns: int = 0) -> System:
    """LRU per layer; predicted experts come in chunks of a matrix, and a demand goes between two of them.

    accuracy: share of named experts that are right [assumed; the paper's own figures were not at hand].
    stride: layers between the hidden state a prediction is made from and the layer it is for.
    predict_ns: time of a prediction, which runs on the CPU beside the step.
    """
    return System(
        "ProMoE",
        predictor=Oracle(accuracy, distance=stride, wraps=False),
        prefetch=Prefetch(latency_ns=predict_ns),
        transfer=Transfer("matrix"),
        source="arXiv 2410.22134",
    )
