"""What an engine must report: our loop's counts, cut as that engine cuts them at the end of a text.

Every engine here lets the target say the first token plainly. Some draft past the wanted length and cut the
text afterwards, others shorten the last drafts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from certdraft.decoding import Chain, TargetRunner, decode, greedy
from certdraft.drafters import Drafter

# Whether drafts keep their length up to the last round, whatever is still wanted.
PAST_END = {"vLLM": True, "llama.cpp": False, "OpenVINO GenAI": True}


@dataclass(frozen=True)
class Counts:
    """Drafts of one or more texts.

    Attributes:
        passes: of the target, after the one that said the first token.
        drafts: those with a draft.
        drafted: draft tokens verified.
        accepted: of these.
        accepted_by_position: rounds whose draft was accepted up to this position at least.
    """

    passes: int
    drafts: int
    drafted: int
    accepted: int
    accepted_by_position: list[int]

    def as_dict(self) -> dict[str, Any]:
        """For the log."""
        return asdict(self)


def counts(
    target: PreTrainedModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    max_new_tokens: int,
) -> dict[str, Counts]:
    """Our loop's counts for chains of `num_tokens`, greedy, from the second token of each text on, by engine.

    One text serves all engines: what is drafted does not depend on where the text is cut, only how much of it
    is verified.
    """
    runner = TargetRunner(target, drafter.taps)
    found: dict[str, list[tuple[int, int]]] = {engine: [] for engine in PAST_END}
    for prompt in prompts:
        start, wanted = [*prompt, *greedy(target, prompt, 1)], max_new_tokens - 1
        for turn in decode(
            runner, drafter, start, Chain(num_tokens), max_new_tokens=wanted + num_tokens + 1
        ).rounds:
            if wanted <= 0:
                break
            for engine, past_end in PAST_END.items():
                drafted = turn.nodes if past_end else min(turn.nodes, wanted - 1)
                found[engine].append((drafted, min(turn.accepted, drafted)))
            wanted -= turn.committed
    return {engine: _sums(rounds, num_tokens) for engine, rounds in found.items()}


def _sums(rounds: list[tuple[int, int]], num_tokens: int) -> Counts:
    drafts = [turn for turn in rounds if turn[0]]
    return Counts(
        passes=len(rounds),
        drafts=len(drafts),
        drafted=sum(drafted for drafted, _ in drafts),
        accepted=sum(accepted for _, accepted in drafts),
        accepted_by_position=[sum(n > position for _, n in drafts) for position in range(num_tokens)],
    )
