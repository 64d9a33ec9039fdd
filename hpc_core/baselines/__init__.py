"""Baselines on disk: one readable file per case and machine, with the accepted records in a history next to it."""
