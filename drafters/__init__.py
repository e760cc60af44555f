"""Drafter families, tree-cached decoding, checkpoint formats and export (floor 2)."""

from certdraft.drafters.block import BlockDrafter as BlockDrafter
from certdraft.drafters.block_layer import BlockConfig as BlockConfig
from certdraft.drafters.cached_lm import CachedLM as CachedLM
from certdraft.drafters.cached_lm import split_causal_lm as split_causal_lm
from certdraft.drafters.causal import CausalDrafter as CausalDrafter
from certdraft.drafters.draft_vocab import ABSENT as ABSENT
from certdraft.drafters.eagle import EagleDrafter as EagleDrafter
from certdraft.drafters.eagle_layer import EagleConfig as EagleConfig
from certdraft.drafters.exporting import ExportError as ExportError
from certdraft.drafters.exporting import export as export
from certdraft.drafters.exporting import load_drafter as load_drafter
from certdraft.drafters.facts import CardFacts as CardFacts
from certdraft.drafters.facts import read_facts as read_facts
from certdraft.drafters.lint import lint_export as lint_export
from certdraft.drafters.lint_files import Finding as Finding
from certdraft.drafters.lora import LoraSettings as LoraSettings
from certdraft.drafters.paths import Paths as Paths
from certdraft.drafters.pretrained import load_causal_lm as load_causal_lm
from certdraft.drafters.protocol import Drafter as Drafter
from certdraft.drafters.tree_cache import TreeCache as TreeCache
