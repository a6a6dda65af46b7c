"""Real experts, a real cache and a real copy thread on this machine, beside what the simulator says of them."""
