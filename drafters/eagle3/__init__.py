"""EAGLE-3 heads (arXiv 2503.01840)."""
