"""Explain why a case moved: what differs in memory, operators, kernels, stack and case. Runs and judges nothing."""
