"""Many questions at once: sweeps, and what spreads them over processes and machines."""
