"""Exact replay of decoding along the greedy text of a target."""
