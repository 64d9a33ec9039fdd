"""The tuned trainer: fused layers, chunked loss, memory budget, captured steps."""
