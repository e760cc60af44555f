"""Problems as prompts: their text as it stands, or as the user's turn of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from certdraft.arbitration.tasks.problems import Problem
from certdraft.data import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["none", "chat"]


def prompt_texts(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "none",
    system: str | None = None,
    thinking: bool = False,
) -> list[str]:
    """Return the text in front of each response.

    Args:
        problems: what is asked.
        tokenizer: the target's; its chat template is used.
        template: "none" takes prompts as they stand; "chat" makes each the user's turn of a chat.
        system: the system's turn in front of it; without one the template's own, where it has one.
        thinking: value of `enable_thinking` for the template.
    """
    if template == "none":
        return [problem.prompt for problem in problems]
    if not tokenizer.chat_template:
        raise ValueError(
            "texts.template is chat, but the target's tokenizer has no chat template; take an instruct "
            "model, or texts.template none"
        )
    first = [] if system is None else [{"role": "system", "content": system}]
    name = "problem" if system is None else "problem behind a system turn"
    return [
        render_chat(
            tokenizer, [*first, {"role": "user", "content": problem.prompt}],
            problem.where or repr(problem.prompt), thinking=thinking, name=name,
        )
        for problem in problems
    ]  # fmt: skip
