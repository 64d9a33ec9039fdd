"""What was observed, the job and the environment, without torch."""
