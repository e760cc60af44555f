"""The drafter protocol: how a drafter is made, trained, decoded with and exported.

Four kinds ship with certdraft. A causal drafter is fed every drafted token and reads nothing else. An EAGLE
head is fed every drafted token too, and reads the target's hidden states at committed tokens. A block drafter
is fed only the round's root and returns the distributions of all following depths at once. A DSpark drafter
is a block drafter that is fed every drafted token, to correct the distribution after it. Another kind is one
class that implements this protocol, registered with `register_drafter`.

Decoding goes in rounds, batch 1. Committed tokens are those whose place in the text is settled; the latest of
them, the round's root, has not been run through either model yet.

    state = drafter.start(ids, features)              # every committed token but the latest
    while …:
        logits = drafter.draft(state, [root], [-1])   # node 0, then more calls with more nodes
        …                                             # the target verifies, an acceptor picks a path
        drafter.commit(state, path, features)

An accepted leaf was never fed, and a marginal drafter was fed only the root. Such committed tokens are fed
first in the next round, as a chain in front of its root, and are then nodes like any other.

Letters: R rows, T tokens of a row, N committed tokens, K nodes of one call, D draft depth, L aux hidden-state
layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from certdraft.drafters.training_paths import PackedRows, Paths, TokenFeatures, TokenIds, steps_from
from certdraft.support import path_mask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from certdraft.drafters.formats.export_metadata import Engines, ExportRequest
    from certdraft.drafters.formats.lint_files import Layout


@dataclass(frozen=True)
class TargetSource:
    """The target that a drafter is made for. What costs time is a function, called only when it is needed.

    Attributes:
        name: folder or hub id.
        vocab_size: entries of its vocabulary, padding included.
        load: returns the target.
        num_ids: returns the token ids its tokenizer uses: one more than the largest.
        greedy_counts: returns how often the target's greedy token in the trace was each token; None without
            a trace.
        token_mass: returns the probability that the target gave to each token in the trace, summed over its
            positions; None without a trace.
        ends: returns the target with at least its embeddings, final norm and lm_head; `load` if not given.
    """

    name: str
    vocab_size: int
    load: Callable[[], PreTrainedModel]
    num_ids: Callable[[], int]
    greedy_counts: Callable[[], Int[Tensor, " V"] | None] = lambda: None
    token_mass: Callable[[], Float[Tensor, " V"] | None] = lambda: None
    ends: Callable[[], PreTrainedModel] | None = None

    def load_ends(self) -> PreTrainedModel:
        """The target with at least its embeddings, final norm and lm_head."""
        return (self.ends or self.load)()


class Drafter(nn.Module, ABC):
    """Base of every drafter kind.

    Attributes:
        kind: "conditional": `draft` returns [K, V], the next token's distribution after each node given its
            root path. "marginal": `draft` takes the root and returns [D, V], the distributions at depths 1
            to D, independent of the tokens in between.
        taps: aux hidden-state layers: 0-based target layers whose outputs the drafter reads, in the order of
            the L axis; empty when it reads tokens only. `start` and `commit` must then be given features.
        family: name in `drafter.json` and in the registry; set by `register_drafter`.
        description: of the kind, in the model card.
        export_formats: formats that `export` can write, with the engines that read each; the default first.
        reads_target: whether this kind reads hidden states and embeddings of the target.
        layouts: how folders of this kind are recognised, and the rules that `lint_export` checks.
        pretrained: folder or hub id that training starts from; None for fresh weights.
        confidence_weight: of the loss of `confidence` beside the drafter's own; 0: nothing estimates it.
    """

    kind: Literal["conditional", "marginal"]
    taps: tuple[int, ...] = ()
    family: ClassVar[str] = ""
    description: ClassVar[str] = ""
    export_formats: ClassVar[Mapping[str, Engines]] = {}
    layouts: ClassVar[tuple[Layout, ...]] = ()
    reads_target: ClassVar[bool] = False
    pretrained: str | None = None

    @property
    def confidence_weight(self) -> float:
        """See the class."""
        return 0.0

    # ---- made for a target, and again from a checkpoint or a folder

    def build_from_target(self, target: TargetSource) -> Self:
        """Make the network for a target, before the optimiser is made. A network that exists is kept."""
        return self

    def restore(self, target: TargetSource, state: Mapping[str, Tensor]) -> Self:
        """Make the network that the weights of a checkpoint fit; the caller loads them."""
        return self.build_from_target(target)

    @classmethod
    def on_meta(
        cls, target: TargetSource, read_config: Callable[[str], PreTrainedConfig], **arguments: Any
    ) -> Self:
        """Make the network on the meta device, to count its parameters: no weights are read or allocated.

        Args:
            target: `load` returns it on the meta device as well.
            read_config: returns the transformers config of a folder or hub id.
            arguments: of the constructor.
        """
        with torch.device("meta"):
            return cls(**arguments).build_from_target(target)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        vocab_size: int,
        target: PreTrainedModel | None,
        dtype: Literal["float32", "bfloat16"] | None,
    ) -> Self:
        """Load what `write` wrote, in eval mode; arguments as in `load_drafter`."""
        raise NotImplementedError(f"{cls.__name__} cannot be loaded from a folder: it lacks from_folder.")

    def write(self, folder: Path, request: ExportRequest) -> nn.Module:
        """Write the files of an export into an empty folder, and check that they load as this drafter.

        Returns:
            The network as written, whose parameters the model card counts.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be exported: it lacks write.")

    # ---- what others need to know about it

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Entries of the vocabulary, equal to the target's."""

    @property
    def draft_ids(self) -> Int[Tensor, " D"] | None:
        """Target ids of the draft vocabulary, ascending; None: the whole vocabulary."""
        return None

    @property
    def max_context(self) -> int | None:
        """Number of positions it can be used at; None: no limit."""
        return None

    @property
    def max_draft_length(self) -> int | None:
        """Draft tokens of a round at the most; None: no limit."""
        return None

    def engines(self, format: str) -> Engines:
        """Which engines read this drafter in a format: those of `export_formats` that compute its network."""
        return self.export_formats[format]

    @property
    def tokenizer_source(self) -> str | None:
        """Folder or hub id whose tokenizer must be the target's; None: the drafter has the target's own."""
        return None

    @property
    def causal_lm(self) -> PreTrainedModel | None:
        """The transformers causal LM that does all the drafting, for callers that batch it; or None."""
        return None

    @property
    def notice(self) -> str | None:
        """One line for the user about the network that was built, or None."""
        return None

    @property
    def target_config(self) -> dict[str, int | None] | None:
        """Sizes of the target as far as the drafter depends on them, in the keys of a transformers config."""
        return None

    @property
    def network_config(self) -> Any:
        """Sizes of the network, as attributes with the names of a transformers config; None: not known."""
        return None

    def passes(self, seq_len: int) -> tuple[float, float]:
        """Times its layers run over a token of full rows of `seq_len`: mean of a training, most of a step."""
        return 1.0, 1.0

    def at(self, progress: float) -> None:
        """Set the share of the training that is done, in [0, 1]; called before every training step."""

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

    # ---- training

    @abstractmethod
    def hidden(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"] | None = None,
        document_ids: Int[Tensor, "R T"] | None = None,
        features: Float[Tensor, "R T L H"] | None = None,
    ) -> Float[Tensor, "R T H"]:
        """Last hidden state at every token position, from which `head` makes the next token's distribution.

        Separate from `head`, so that a loss can pick its positions before the vocabulary axis appears.

        Args:
            input_ids: packed rows of tokens.
            position_ids: position of each token in its document. None: each row is one document.
            document_ids: document of each token, −1 for padding; no attention across documents. None: each
                row is one document.
            features: outputs of the aux hidden-state layers at the same positions, for drafters that read
                them.
        """

    @abstractmethod
    def head(self, hidden: Float[Tensor, "*step H"]) -> Float[Tensor, "*step V"]:
        """fp32 logits of the next token, whatever autocast and the dtype of the drafter; differentiable."""

    def confidence(self, hidden: Float[Tensor, "*step H"]) -> Float[Tensor, "*step"]:
        """fp32 logits of the chance that a draft token is accepted, for kinds with a `confidence_weight`.

        Their decoding state has an attribute `confidence`, the chances [K] after the nodes of the last call.
        """
        raise NotImplementedError(f"{type(self).__name__} estimates no confidence.")

    def logits(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"] | None = None,
        document_ids: Int[Tensor, "R T"] | None = None,
        features: Float[Tensor, "R T L H"] | None = None,
    ) -> Float[Tensor, "R T V"]:
        """Next-token logits at every token position: `head(hidden(…))`."""
        return self.head(self.hidden(input_ids, position_ids, document_ids, features))

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "R T V"]:
        """Alias of `logits`."""
        return self.logits(*args, **kwargs)

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
        """Rounds of drafting along the true text, for training and validation; kinds make them in `rounds`.

        Args:
            input_ids: packed rows of tokens.
            position_ids: restart with every document.
            document_ids: −1 for padding.
            loss_mask: true where the next token is to be learned.
            features: as in `hidden`.
            depth: draft tokens of a round; None: as many as are trained now. The result may have fewer.
            every: a path from every position in the loss mask, in order, nothing drawn at random.
        """
        return self.rounds(
            PackedRows(input_ids, position_ids, document_ids, loss_mask, features), depth, every
        )

    def rounds(self, rows: PackedRows, depth: int | None, every: bool) -> Paths:
        """See `paths`.

        The default is for drafters whose distribution depends only on the text: one draft a path, from every
        token position in the loss mask.
        """
        ids, positions, documents, loss_mask, features = rows
        hidden = self.hidden(ids, positions, documents, features).flatten(0, 1)
        mask = path_mask(loss_mask, documents, 1).flatten(0, 1)
        starts = mask[:, 0].nonzero().squeeze(-1)
        return Paths(hidden[starts, None], steps_from(starts, mask[starts]), mask[starts])

    @property
    def own_layers(self) -> list[nn.Module]:
        """Decoder layers of classes of its own, whose `forward` (and `context`) training calls.

        They are sharded and compiled one by one, as those of transformers models inside a drafter are.
        """
        return []

    def validation_mask(
        self, input_ids: Int[Tensor, "R T"], loss_mask: Bool[Tensor, "R T"]
    ) -> Bool[Tensor, "R T"]:
        """Positions of the loss mask that validation drafts from, for metrics that estimate those of all.

        The default is all of them. A kind whose training drafts from some of them keeps as many, chosen by
        the text of the row alone: the same in every validation, batch and rank.
        """
        return loss_mask

    # ---- decoding

    @abstractmethod
    def start(self, ids: TokenIds, features: TokenFeatures | None = None) -> Any:
        """Return the decoding state of a text.

        Args:
            ids: every committed token but the latest, which is the root of the first round.
            features: aux hidden-state layers at these tokens, for drafters that read them.
        """

    @abstractmethod
    def draft(self, state: Any, tokens: TokenIds, parents: TokenIds) -> Float[Tensor, "K V"]:
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

    def draft_narrow(self, state: Any, tokens: TokenIds, parents: TokenIds) -> Float[Tensor, "K D"]:
        """`draft` with logits of `draft_ids` only, where there is a draft vocabulary of D tokens."""
        return self.draft(state, tokens, parents)

    @abstractmethod
    def commit(self, state: Any, path: Sequence[int], features: TokenFeatures | None = None) -> None:
        """End the round: a path of its nodes becomes committed text, every other node is forgotten.

        Args:
            state: from `start`; modified.
            path: nodes of this round, root first. Empty: forget the round.
            features: aux hidden-state layers at all tokens the round committed, for drafters that read them:
                at the root and the path's nodes below it, then at accepted tokens not fed yet. Nodes in front
                of the root were committed, with their features, by earlier rounds.
        """
