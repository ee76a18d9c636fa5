"""Measured speed, beside named baselines in the same run."""
