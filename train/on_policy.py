"""On-policy rounds: ends of documents that the drafter writes itself, judged by the running target.

While decoding, the second draft token of a round follows the drafter's first one, not the text. Training on
the target's text alone never shows the drafter what its own draft tokens lead to. Here every document of a
batch is cut at a random token position, the drafter goes on from there for one round, greedily, and what
followed in the document leaves the loss mask. The target then reads the batch, as it reads any other.

Letters: R rows · T tokens a row · G documents · P rounds · K draft tokens a round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from certdraft.data import Batch
from certdraft.drafters import Drafter
from certdraft.train.target_outputs import TargetSettings


@dataclass(frozen=True)
class OnPolicySettings:
    """How often and how far the drafter writes its own training text.

    Args:
        depth: draft tokens a round, >= 1; each costs a pass of the drafter over the batch, without gradient.
        share: of the micro-batches that get rounds, in (0, 1].

    Raises:
        ValueError: a setting out of its range.
    """

    depth: int = 4
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"on_policy.depth is {self.depth}; a round has at least one draft token")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(
                f"on_policy.share is {self.share}; it must be above 0 and at most 1. Without on_policy all "
                "text is the target's"
            )


def check_on_policy(drafter: Drafter, target: TargetSettings | None) -> None:
    """Raise ValueError where a drafter cannot train on its own rounds, or nothing judges them."""
    if drafter.reads_target or drafter.kind != "conditional":
        raise ValueError(
            f"model.on_policy is for drafters that read tokens only; {type(drafter).__name__} reads the "
            "target's hidden states, which its own draft tokens do not have while it drafts"
        )
    if target is None or not target.logits:
        raise ValueError(
            "model.on_policy needs the target to judge what the drafter writes, and a trace holds only the "
            "target's own text: set model.target.name (and leave model.target.logits true)"
        )


@dataclass(frozen=True)
class Rounds:
    """The rounds that a drafter wrote into a batch.

    Attributes:
        steps: flat positions, into [R·T], whose next token is a draft token.
        tokens: those draft tokens.
    """

    steps: Int[Tensor, "P K"]
    tokens: Int[Tensor, "P K"]

    def rejected(self, greedy: Int[Tensor, "P K"], num_steps: int) -> Int[Tensor, " N"]:
        """Draft tokens since the first rejection of each position's round; see `TargetBatch.rejected`.

        Args:
            greedy: the target's greedy token at every draft token.
            num_steps: R·T.
        """
        accepted = (self.tokens == greedy).cumprod(-1)
        since = (1 - accepted).cumsum(-1) - 1
        found = torch.full((num_steps,), -1, device=greedy.device)
        found[self.steps.flatten()] = since.flatten()
        return found


@torch.no_grad()
def write_rounds(drafter: Drafter, batch: Batch, depth: int) -> tuple[Batch, Rounds]:
    """Let the drafter go on from a random position of every document, drawn with torch's CPU generator.

    Args:
        drafter: drafts one token at a time.
        batch: packed rows.
        depth: draft tokens a round; documents with no position in the loss mask that has as many tokens after
            it stay as they are.

    Returns:
        The batch with draft tokens in place of the text, without recorded logits, its loss mask ending with
        the rounds; and the rounds.
    """
    starts = _starts(batch, depth)
    steps = starts[:, None] + torch.arange(depth, device=starts.device)
    ids = batch.input_ids.clone()
    training = drafter.training
    drafter.eval()  # drafts as it will when it decodes, without dropout
    for place in steps.T:
        here = torch.zeros_like(batch.loss_mask)
        here.view(-1)[place] = True
        # `paths` is what FSDP2 gathers weights for; the one at a position that starts a round ends there
        hidden = drafter.paths(ids, batch.position_ids, batch.document_ids, here, depth=1, every=True).hidden
        ids.view(-1)[place + 1] = drafter.head(hidden[:, 0]).argmax(-1)
    drafter.train(training)
    _, document = batch.document_ids.flatten().unique(return_inverse=True)
    last = torch.full((int(document.max()) + 1,), ids.numel(), device=ids.device)
    last[document[starts]] = steps[:, -1]
    kept = torch.arange(ids.numel(), device=ids.device) <= last[document]
    written = replace(
        batch, input_ids=ids, loss_mask=batch.loss_mask & kept.view_as(batch.loss_mask), head=None
    )
    return written, Rounds(steps, ids.view(-1)[steps + 1])


def _starts(batch: Batch, depth: int) -> Int[Tensor, " P"]:
    """One flat position a document, drawn among those that can start a round."""
    documents, mask = batch.document_ids, batch.loss_mask.clone()
    mask[:, documents.shape[1] - depth :] = False
    mask[:, : documents.shape[1] - depth] &= documents[:, depth:] == documents[:, :-depth]
    can_start: Bool[Tensor, " N"] = mask.flatten()
    _, document = documents.flatten().unique(return_inverse=True)
    drawn = torch.rand(can_start.shape).to(can_start.device)
    drawn = drawn.masked_fill(~can_start, -1.0)
    best = drawn.new_full((int(document.max()) + 1,), -1.0).scatter_reduce(0, document, drawn, "amax")
    return (can_start & (drawn == best[document])).nonzero().squeeze(-1)
