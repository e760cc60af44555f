"""Latency models, and trees sized by them (CaDDTree, arXiv 2606.01813)."""
