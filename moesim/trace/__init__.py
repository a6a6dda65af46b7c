"""Routing traces: read, check, describe, import, draw."""

from moesim.trace.trace import DECODE, PHASES, PREFILL, Requests, Trace, TraceInfo

__all__ = ["DECODE", "PHASES", "PREFILL", "Requests", "Trace", "TraceInfo"]
