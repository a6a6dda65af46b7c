"""A whole step at once: the same results as moesim.engine.events, hundreds of times faster."""
