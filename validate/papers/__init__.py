"""What the papers report, set up again: each system beside its own baselines (docs/papers.md)."""
