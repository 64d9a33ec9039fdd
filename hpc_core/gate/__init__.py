"""Judge values against baselines. No torch, no files: values in, verdicts out."""
