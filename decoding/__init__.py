"""Draft -> tree -> verify -> accept -> commit: the loop, tree builders, acceptors and costs (floor 3)."""

from certdraft.decoding.acceptors import Acceptor, Relaxed, SampleMatch, Strict, Verdict, as_acceptor
from certdraft.decoding.batched import decode_batch
from certdraft.decoding.cost.cost_aware import CostAware
from certdraft.decoding.cost.cost_model import Clock, CostModel, RealClock, TableClock
from certdraft.decoding.cost.profiling import profile
from certdraft.decoding.loop import DecodeResult, Round, acceptance_length, decode, greedy
from certdraft.decoding.replay.exact_replay import greedy_ranks, replay
from certdraft.decoding.target_runner import TargetRunner, context_limit, device_name, fingerprint
from certdraft.decoding.trees.builders import BestFirst, Chain, CutChain, Propose, StaticTree, TreeBuilder
from certdraft.decoding.trees.ranking import NonFiniteLogits, greedy_ids, top_rows
from certdraft.decoding.trees.tree import NodeStream, Tree

__all__ = [
    "Acceptor", "BestFirst", "Chain", "Clock", "CostAware", "CostModel", "CutChain", "DecodeResult",
    "NodeStream", "NonFiniteLogits", "Propose", "RealClock", "Relaxed", "Round", "SampleMatch", "StaticTree",
    "Strict", "TableClock", "TargetRunner", "Tree", "TreeBuilder", "Verdict", "acceptance_length",
    "as_acceptor", "context_limit", "decode", "decode_batch", "device_name", "fingerprint", "greedy",
    "greedy_ids", "greedy_ranks", "profile", "replay", "top_rows",
]  # fmt: skip
