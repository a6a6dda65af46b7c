"""Routing traces: read, check, describe, import, draw."""

from moesim.trace.trace import DECODE, PHASES, PREFILL, WEIGHT_ONE, Requests, Trace, TraceInfo

__all__ = ["DECODE", "PHASES", "PREFILL", "WEIGHT_ONE", "Requests", "Trace", "TraceInfo"]
