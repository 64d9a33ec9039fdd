"""Triton kernels of the decoder, and the layouts they read."""
