"""Start workers, and end everything they start. Never imports torch, nor what needs it."""
