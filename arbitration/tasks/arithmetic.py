"""Sums and products of digits: problems on which two small models can be given complementary skill.

A problem is a few parts in a row, "3+47*8=", answered part by part with two digits each, "07;56". What a
model learns is set by `skill`: the chance that the result of a sum, or of a product, counts in its loss. A
model of skill {"+": 1, "*": 0.02} has seen the same text as its opposite and knows the format as well, but
has hardly been taught to multiply.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from certdraft.arbitration.tasks.problems import Problem

Split = Literal["train", "validation", "test"]
OPERATORS = ("+", "*")
IGNORED = -100  # label of a token that is not learned
_PART = 3  # characters of a part, and of its answer with the mark behind it


def arithmetic(split: Split, count: int, seed: int = 0, parts: int = 2) -> list[Problem]:
    """Problems of random parts; families "sums", "products" and "mixed".

    Args:
        split: chosen by a hash of the prompt: 80 % of all prompts are "train", 10 % "validation", 10 %
            "test", so no test problem is a training problem.
        count: problems; all different, except in training.
        seed: of the draw.
        parts: of a problem, 1 to 8.

    Raises:
        ValueError: parts outside 1 to 8, or more problems than there are.

    Examples:
        >>> [(p.prompt, p.answer, p.family) for p in arithmetic("test", 2, parts=2)]
        [('9+97*0=', '18;00', 'mixed'), ('9*06*5=', '00;30', 'products')]
    """
    if not 1 <= parts <= 8:
        raise ValueError(f"parts is {parts}; a problem has 1 to 8")
    rng = random.Random(f"{split} {seed} {parts}")
    problems: list[Problem] = []
    seen: set[str] = set()
    misses = 0
    while len(problems) < count:
        drawn = [(rng.randrange(10), rng.choice(OPERATORS), rng.randrange(10)) for _ in range(parts)]
        prompt = "".join(f"{left}{operator}{right}" for left, operator, right in drawn) + "="
        if _split_of(prompt) != split or (split != "train" and prompt in seen):
            misses += 1
            if misses > 100_000:
                raise ValueError(f"there are fewer than {count} {split} problems of {parts} parts")
            continue
        misses = 0
        seen.add(prompt)
        results = (left + right if op == "+" else left * right for left, op, right in drawn)
        operators = {operator for _, operator, _ in drawn}
        family = "mixed" if len(operators) > 1 else "sums" if "+" in operators else "products"
        answer = ";".join(f"{result:02}" for result in results)
        problems.append(Problem(prompt, answer, family=family, where=f"{split} {len(problems)}"))
    return problems


def training_rows(
    problems: Sequence[Problem],
    skill: Mapping[str, float],
    ids: Mapping[str, int],
    end: int,
    rng: np.random.Generator,
) -> tuple[Int[Tensor, "R T"], Int[Tensor, "R T"]]:
    """Prompts with their answers as rows of ids, and which of them are learned.

    Args:
        problems: one a row, all of the same number of parts.
        skill: operator → chance that the digits of its result are learned.
        ids: character → id.
        end: id of the end-of-text token, which closes an answer.
        rng: decides which digits are learned.

    Returns:
        ids and labels; a label is the id, or −100 for prompts and for digits that are not learned.
    """
    texts = [problem.prompt + problem.answer for problem in problems]
    rows = torch.tensor([[*(ids[character] for character in text), end] for text in texts])
    labels = rows.clone()
    start = len(problems[0].prompt)
    labels[:, :start] = IGNORED
    for row, problem in enumerate(problems):
        for part, operator in enumerate(problem.prompt[1:start:_PART]):
            if rng.random() >= skill[operator]:
                labels[row, start + _PART * part :][:2] = IGNORED
    return rows, labels


def _split_of(prompt: str) -> Split:
    place = hashlib.sha256(prompt.encode()).digest()[0] / 256
    return "train" if place < 0.8 else "validation" if place < 0.9 else "test"
