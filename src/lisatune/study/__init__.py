"""Studies of weights layer by layer."""
