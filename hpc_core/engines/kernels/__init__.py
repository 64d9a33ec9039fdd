"""Who runs a workload: stock, the CUDA-graph decoder, the tuned trainer, a callable."""
