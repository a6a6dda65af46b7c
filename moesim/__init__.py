"""moesim: what an MoE model will do on a machine, before anyone buys or reloads anything."""

__version__ = "0.1.0.dev0"
