"""Two sides, one judgement: A/B of revisions or interpreters, and bisecting on top of it. Imports no torch; workers do."""
