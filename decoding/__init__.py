"""Draft -> tree -> verify -> accept -> commit: the loop, tree builders, acceptors and costs (floor 3)."""

from certdraft.decoding.acceptors import Acceptor as Acceptor
from certdraft.decoding.acceptors import Relaxed as Relaxed
from certdraft.decoding.acceptors import SampleMatch as SampleMatch
from certdraft.decoding.acceptors import Strict as Strict
from certdraft.decoding.acceptors import Verdict as Verdict
from certdraft.decoding.acceptors import as_acceptor as as_acceptor
from certdraft.decoding.batched import decode_batch as decode_batch
from certdraft.decoding.cost.cost_aware import CostAware as CostAware
from certdraft.decoding.cost.cost_model import Clock as Clock
from certdraft.decoding.cost.cost_model import CostModel as CostModel
from certdraft.decoding.cost.cost_model import RealClock as RealClock
from certdraft.decoding.cost.cost_model import TableClock as TableClock
from certdraft.decoding.cost.profiling import profile as profile
from certdraft.decoding.loop import DecodeResult as DecodeResult
from certdraft.decoding.loop import Round as Round
from certdraft.decoding.loop import acceptance_length as acceptance_length
from certdraft.decoding.loop import decode as decode
from certdraft.decoding.loop import greedy as greedy
from certdraft.decoding.replay.exact_replay import greedy_ranks as greedy_ranks
from certdraft.decoding.replay.exact_replay import replay as replay
from certdraft.decoding.target_runner import TargetRunner as TargetRunner
from certdraft.decoding.target_runner import context_limit as context_limit
from certdraft.decoding.target_runner import device_name as device_name
from certdraft.decoding.target_runner import fingerprint as fingerprint
from certdraft.decoding.trees.builders import BestFirst as BestFirst
from certdraft.decoding.trees.builders import Chain as Chain
from certdraft.decoding.trees.builders import Propose as Propose
from certdraft.decoding.trees.builders import StaticTree as StaticTree
from certdraft.decoding.trees.builders import TreeBuilder as TreeBuilder
from certdraft.decoding.trees.cut_chain import CutChain as CutChain
from certdraft.decoding.trees.ranking import NonFiniteLogits as NonFiniteLogits
from certdraft.decoding.trees.ranking import greedy_ids as greedy_ids
from certdraft.decoding.trees.ranking import top_rows as top_rows
from certdraft.decoding.trees.tree import NodeStream as NodeStream
from certdraft.decoding.trees.tree import Tree as Tree

__all__ = [
    "Acceptor", "BestFirst", "Chain", "Clock", "CostAware", "CostModel", "CutChain", "DecodeResult",
    "NodeStream", "NonFiniteLogits", "Propose", "RealClock", "Relaxed", "Round", "SampleMatch",
    "StaticTree", "Strict", "TableClock", "TargetRunner", "Tree", "TreeBuilder", "Verdict",
    "acceptance_length", "as_acceptor", "context_limit", "decode", "decode_batch", "device_name",
    "fingerprint", "greedy", "greedy_ids", "greedy_ranks", "profile", "replay", "top_rows",
]  # fmt: skip
