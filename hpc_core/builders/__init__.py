"""From specification to torch objects: the model, its quantization, its adapter, its data. Measures nothing."""
