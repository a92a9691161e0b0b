"""Ways to run a pair from Python; each resolved only when asked for."""
