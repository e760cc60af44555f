"""Drafter kinds and their registry, tree-cached decoding, checkpoint formats and export (floor 2)."""

from certdraft.drafters.causal.layer_cut import TargetLayers as TargetLayers
from certdraft.drafters.causal.lora import LoraSettings as LoraSettings
from certdraft.drafters.causal.model import CausalDrafter as CausalDrafter
from certdraft.drafters.dflash.config import BlockConfig as BlockConfig
from certdraft.drafters.dflash.model import BlockDrafter as BlockDrafter
from certdraft.drafters.dspark.config import DSparkConfig as DSparkConfig
from certdraft.drafters.dspark.model import DSparkDrafter as DSparkDrafter
from certdraft.drafters.eagle3.config import EagleConfig as EagleConfig
from certdraft.drafters.eagle3.draft_vocab import ABSENT as ABSENT
from certdraft.drafters.eagle3.model import EagleDrafter as EagleDrafter
from certdraft.drafters.formats.export_metadata import CardFacts as CardFacts
from certdraft.drafters.formats.export_metadata import Engines as Engines
from certdraft.drafters.formats.export_metadata import ExportRequest as ExportRequest
from certdraft.drafters.formats.export_metadata import read_facts as read_facts
from certdraft.drafters.formats.exporting import ExportError as ExportError
from certdraft.drafters.formats.exporting import export as export
from certdraft.drafters.formats.exporting import load_drafter as load_drafter
from certdraft.drafters.formats.lint_export import lint_export as lint_export
from certdraft.drafters.formats.lint_files import Finding as Finding
from certdraft.drafters.formats.lint_files import Layout as Layout
from certdraft.drafters.lm.cached_lm import CachedLM as CachedLM
from certdraft.drafters.lm.cached_lm import split_causal_lm as split_causal_lm
from certdraft.drafters.lm.chain_cache import ChainCache as ChainCache
from certdraft.drafters.lm.tree_cache import TreeCache as TreeCache
from certdraft.drafters.protocol import Drafter as Drafter
from certdraft.drafters.protocol import TargetSource as TargetSource
from certdraft.drafters.registry import drafter_kinds as drafter_kinds
from certdraft.drafters.registry import register_drafter as register_drafter
from certdraft.drafters.training_paths import Paths as Paths
from certdraft.support import load_causal_lm as load_causal_lm

__all__ = [
    "ABSENT", "BlockConfig", "BlockDrafter", "CachedLM", "CardFacts", "CausalDrafter", "ChainCache",
    "DSparkConfig", "DSparkDrafter", "Drafter", "EagleConfig", "EagleDrafter", "Engines", "ExportError",
    "ExportRequest", "Finding", "Layout", "LoraSettings", "Paths", "TargetLayers", "TargetSource",
    "TreeCache", "drafter_kinds", "export", "lint_export", "load_causal_lm", "load_drafter", "read_facts",
    "register_drafter", "split_causal_lm",
]  # fmt: skip
