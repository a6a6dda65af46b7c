"""Sub-commands, mounted by moesim.cli; heavy imports happen inside them."""
