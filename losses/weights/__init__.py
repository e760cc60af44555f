"""Weights of token positions and draft paths, and the reduction."""
