"""Problems as prompts: their text as it stands, or as the user's turn of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from certdraft.arbitration.tasks.problems import Problem

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

    Raises:
        ValueError: "chat" with a tokenizer that has no chat template, or one that rejects the turns.
    """
    if template == "none":
        return [problem.prompt for problem in problems]
    if not tokenizer.chat_template:
        raise ValueError(
            "texts.template is chat, but the target's tokenizer has no chat template; take an instruct "
            "model, or texts.template none"
        )
    return [_rendered(problem, tokenizer, system, thinking) for problem in problems]


def _rendered(
    problem: Problem, tokenizer: PreTrainedTokenizerBase, system: str | None, thinking: bool
) -> str:
    from jinja2 import TemplateError

    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": problem.prompt})
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise ValueError(
            f"{problem.where or repr(problem.prompt)}: the chat template rejects this problem"
            f"{'' if system is None else ' behind a system turn'}: {error}"
        ) from error
    assert isinstance(text, str)
    return text
