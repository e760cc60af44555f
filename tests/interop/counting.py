"""What an engine must report: our loop's text and counts, under that engine's habits at both ends of a text.

Engines differ in two harmless ways. Some let the target say the first token plainly and draft from the second
on; some draft past the wanted length and cut the text afterwards.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from certdraft.decoding import Chain, TargetRunner, decode, greedy
from certdraft.drafters import Drafter


@dataclass(frozen=True)
class Habits:
    """How an engine treats the ends of a text.

    Attributes:
        first_plain: the target says the first token without a draft.
        past_end: drafts keep their length up to the last round, whatever is still wanted.
    """

    first_plain: bool
    past_end: bool


HABITS = {
    "vLLM": Habits(first_plain=True, past_end=True),
    "llama.cpp": Habits(first_plain=True, past_end=False),
    "OpenVINO GenAI": Habits(first_plain=True, past_end=False),
    "transformers": Habits(first_plain=False, past_end=False),
}


@dataclass(frozen=True)
class Counts:
    """Drafts of one or more texts.

    Attributes:
        drafts: rounds with a draft.
        drafted: draft tokens verified.
        accepted: of these.
        accepted_by_position: rounds whose draft was accepted up to this position at least.
    """

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
    habits: Habits,
) -> Counts:
    """Our loop's counts for chains of `num_tokens`, greedy, as an engine of these habits would count them."""
    runner, rounds = TargetRunner(target, drafter.taps), []
    for prompt in prompts:
        start, wanted = list(prompt), max_new_tokens
        if habits.first_plain:
            start, wanted = [*start, *greedy(target, start, 1)], max_new_tokens - 1
        room = num_tokens + 1 if habits.past_end else 0
        done = 0
        for turn in decode(runner, drafter, start, Chain(num_tokens), max_new_tokens=wanted + room).rounds:
            if done < wanted:
                rounds.append(turn)
            done += turn.committed
    drafts = [turn for turn in rounds if turn.nodes]
    return Counts(
        len(drafts),
        sum(turn.nodes for turn in drafts),
        sum(turn.accepted for turn in drafts),
        [sum(turn.accepted > position for turn in drafts) for position in range(num_tokens)],
    )
