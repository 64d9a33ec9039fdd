"""Workloads: what one step does, and what it must at least cost. Knows nothing of clocks and counters."""
