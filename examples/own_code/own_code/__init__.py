"""A byte-level language model, how to train it and how to generate with it."""
