"""Instruments: clock, busy time, memory, counters, ceilings. They watch a program's steps and know nothing of models."""
