"""Causal LMs: loading, and tree decoding with a cache."""
