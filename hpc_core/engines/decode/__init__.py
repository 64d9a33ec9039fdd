"""The decoder that replays one CUDA graph a token."""
