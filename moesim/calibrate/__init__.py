"""Measure this machine: microbenchmarks whose samples, with their conditions, become a profile (docs/calibration.md).

The only package beside trace/capture and validate/ that needs torch; nothing here is imported before it is used.
"""
