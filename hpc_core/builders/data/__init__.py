"""Prompts and training rows: texts, recorded lengths, token ids, batches. No torch, no model, no clock."""
