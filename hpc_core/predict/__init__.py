"""The same case on a fake GPU: the same engines on fake tensors, above a model of the GPU's allocator.

Importing this package imports no torch: `predict.shim` must be loaded before torch is.
"""
