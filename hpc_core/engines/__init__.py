"""The tuned ways to run a workload: decode by a CUDA graph, train by a compiled, captured step. Every switch is a field of the spec."""
