"""Injected faults: realistic ways to become slower, bigger or wrong, to test whether the gate catches them."""
