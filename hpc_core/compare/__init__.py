"""A/B of two revisions or interpreters, and bisection over package versions on top of it. Imports no torch; workers do."""
