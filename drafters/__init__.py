"""Drafter families, tree-cached decoding, checkpoint formats and export (floor 2)."""

from certdraft.drafters.cached_lm import CachedLM as CachedLM
from certdraft.drafters.cached_lm import split_causal_lm as split_causal_lm
from certdraft.drafters.tree_cache import TreeCache as TreeCache
