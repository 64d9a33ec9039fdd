"""What to run: cases, their parts and their limits. Imports no torch."""
