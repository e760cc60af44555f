"""What every drafter offers: a training forward and a decoding state.

Three families fit this frame. A causal drafter is fed every drafted token and reads nothing else. An EAGLE
head is fed every drafted token too, and reads the target's features of committed tokens. A block drafter is
fed the round's root alone and answers with the distributions of all following depths at once.

Decoding goes in rounds, batch 1. Committed tokens are those whose place in the text is settled; the latest of
them, the round's root, has not been run through either model yet.

    state = drafter.start(ids, features)              # every committed token but the latest
    while …:
        logits = drafter.draft(state, [root], [-1])   # node 0, then more calls with more nodes
        …                                             # the target verifies, an acceptor picks a path
        drafter.commit(state, path, features)

An accepted leaf was never fed, and a marginal drafter was fed the root alone. Such committed tokens are fed
first thing in the next round, as a chain in front of its root, and are then nodes like any other.

Letters: R rows, T tokens of a row, N committed tokens, K nodes of one call, D draft depth, L tapped layers,
H hidden, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from certdraft.drafters.training_paths import Paths, reach, steps_from


class Drafter(nn.Module, ABC):
    """Base of the drafter families.

    Attributes:
        kind: "conditional": `draft` answers [K, V], the next token's distribution after each node given its
            root path. "marginal": `draft` takes the root and answers [D, V], the distributions at depths 1
            to D, whatever stands in between.
        taps: 0-based target layers whose outputs the drafter reads, in the order of the L axis; empty when it
            reads tokens only. `start` and `commit` must then be given features.
    """

    kind: Literal["conditional", "marginal"]
    taps: tuple[int, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast, except that rotary frequencies stay fp32.

        `to(bfloat16)` would round them too: an angle is then off by up to a radian at position 1000, and the
        network is not the one that a loader of its bf16 weights gets.
        """
        exact = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.dtype == torch.float32
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in exact:
            moved = module.get_buffer(name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                module._buffers[name] = buffer.to(moved.device)
        return self

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Entries of the vocabulary, equal to the target's."""

    @property
    def max_context(self) -> int | None:
        """Positions it can read; None: no limit."""
        return None

    def at(self, progress: float) -> None:
        """Told before every training step: the share of the training that is done, in [0, 1]."""

    @abstractmethod
    def hidden(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"] | None = None,
        document_ids: Int[Tensor, "R T"] | None = None,
        features: Float[Tensor, "R T L H"] | None = None,
    ) -> Float[Tensor, "R T H"]:
        """Last hidden state at every step, from which `head` makes the distribution of the next token.

        Apart from `head`, so that a loss can pick its steps before the vocabulary axis appears.

        Args:
            input_ids: packed rows of tokens.
            position_ids: position of each token in its document. None: each row is one document.
            document_ids: document of each token, −1 for padding; no attention across documents. None: each
                row is one document.
            features: outputs of the tapped target layers at the same steps, for drafters that read them.
        """

    @abstractmethod
    def head(self, hidden: Float[Tensor, "*step H"]) -> Float[Tensor, "*step V"]:
        """fp32 logits of the next token, whatever autocast and the dtype of the drafter; differentiable."""

    def logits(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"] | None = None,
        document_ids: Int[Tensor, "R T"] | None = None,
        features: Float[Tensor, "R T L H"] | None = None,
    ) -> Float[Tensor, "R T V"]:
        """`head(hidden(…))`: next-token logits at every step."""
        return self.head(self.hidden(input_ids, position_ids, document_ids, features))

    def forward(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"] | None = None,
        document_ids: Int[Tensor, "R T"] | None = None,
        features: Float[Tensor, "R T L H"] | None = None,
    ) -> Float[Tensor, "R T V"]:
        """`logits`."""
        return self.logits(input_ids, position_ids, document_ids, features)

    def paths(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"],
        document_ids: Int[Tensor, "R T"],
        loss_mask: Bool[Tensor, "R T"],
        features: Float[Tensor, "R T L H"] | None = None,
        depth: int | None = None,
        every: bool = False,
    ) -> Paths:
        """What training and validation look at: rounds of drafting along the true text.

        The default is for drafters whose distribution depends on the text alone: one draft a path, from every
        counted step.

        Args:
            input_ids: packed rows of tokens.
            position_ids: restart with every document.
            document_ids: −1 for padding.
            loss_mask: true where the next token is to be learned.
            features: as in `hidden`.
            depth: drafts of a round; None: as many as the family trains now. It may give fewer.
            every: a path from every counted step, in order, nothing drawn at random.
        """
        hidden = self.hidden(input_ids, position_ids, document_ids, features).flatten(0, 1)
        mask = reach(loss_mask, document_ids, 1).flatten(0, 1)
        starts = mask[:, 0].nonzero().squeeze(-1)
        return Paths(hidden[starts, None], steps_from(starts, mask[starts]), mask[starts])

    @abstractmethod
    def start(
        self, ids: Int[Tensor, " N"] | Sequence[int], features: Float[Tensor, "N L H"] | None = None
    ) -> Any:
        """The decoding state of a text.

        Args:
            ids: every committed token but the latest, which is the root of the first round.
            features: the tapped target layers at these tokens, for drafters that read them.
        """

    @abstractmethod
    def draft(
        self,
        state: Any,
        tokens: Int[Tensor, " K"] | Sequence[int],
        parents: Sequence[int] | Int[Tensor, " K"],
    ) -> Float[Tensor, "K V"]:
        """Feed nodes of the draft tree in one pass.

        Nodes are numbered from 0 in the order they are fed in the round.

        Args:
            state: from `start`; holds the new nodes afterwards.
            tokens: token of each new node. A marginal drafter takes one call, a chain that ends in the root.
            parents: number of each new node's parent, −1 for a child of the last committed token it has read.

        Returns:
            fp32 logits. Conditional: [K, V], of the token after each new node. Marginal: [D, V], of the
            tokens at depths 1 to D.
        """

    @abstractmethod
    def commit(self, state: Any, path: Sequence[int], features: Float[Tensor, "N L H"] | None = None) -> None:
        """End the round: a path of its nodes becomes committed text, every other node is forgotten.

        Args:
            state: from `start`; modified.
            path: nodes of this round, root first. Empty: forget the round.
            features: the tapped target layers at all tokens the round committed, for drafters that read them:
                at the root and the path's nodes below it, then at accepted tokens not fed yet. Nodes in front
                of the root were committed, with their features, by earlier rounds.
        """
