"""Optimizers side by side: what launch/benchmark.py does."""
