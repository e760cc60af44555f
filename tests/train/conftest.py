"""Fixtures of the training tests."""

from oracles.runs.tiny_runs import settings, tiny, write

__all__ = ["settings", "tiny", "write"]
