"""Drafter kinds and their registry, tree-cached decoding, checkpoint formats and export (floor 2)."""

from certdraft.drafters.causal.layer_cut import TargetLayers
from certdraft.drafters.causal.lora import LoraSettings
from certdraft.drafters.causal.model import CausalDrafter
from certdraft.drafters.dflash.config import BlockConfig
from certdraft.drafters.dflash.model import BlockDrafter
from certdraft.drafters.dspark.config import DSparkConfig
from certdraft.drafters.dspark.model import DSparkDrafter
from certdraft.drafters.eagle3.config import EagleConfig
from certdraft.drafters.eagle3.draft_vocab import ABSENT
from certdraft.drafters.eagle3.draft_vocab import coverage as draft_vocab_coverage
from certdraft.drafters.eagle3.model import EagleDrafter
from certdraft.drafters.formats.export_metadata import CardFacts, Engines, ExportRequest, read_facts
from certdraft.drafters.formats.exporting import ExportError, export, load_drafter
from certdraft.drafters.formats.lint_export import lint_export
from certdraft.drafters.formats.lint_files import Finding, Layout
from certdraft.drafters.lm.cached_lm import CachedLM, split_causal_lm
from certdraft.drafters.lm.chain_cache import ChainCache
from certdraft.drafters.lm.tree_cache import TreeCache
from certdraft.drafters.protocol import Drafter, TargetSource
from certdraft.drafters.registry import drafter_kinds, register_drafter
from certdraft.drafters.training_paths import Paths
from certdraft.support import load_causal_lm

__all__ = [
    "ABSENT", "BlockConfig", "BlockDrafter", "CachedLM", "CardFacts", "CausalDrafter", "ChainCache",
    "DSparkConfig", "DSparkDrafter", "Drafter", "EagleConfig", "EagleDrafter", "Engines", "ExportError",
    "ExportRequest", "Finding", "Layout", "LoraSettings", "Paths", "TargetLayers", "TargetSource",
    "TreeCache", "draft_vocab_coverage", "drafter_kinds", "export", "lint_export", "load_causal_lm",
    "load_drafter", "read_facts", "register_drafter", "split_causal_lm",
]  # fmt: skip
