"""Baselines: losses that make the drafter imitate the target."""
