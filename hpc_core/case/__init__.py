"""What to run in one folder."""
