"""Prompts that an instruct model writes itself, for when there are no chats to record.

Its chat template is opened at the user's turn, followed by first words where these are given, and the rest is
sampled.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.data.corpus.accounting import Accounting
from certdraft.data.record.generation import eos_ids_of
from certdraft.data.record.learned_positions import loop_onset
from certdraft.data.record.running_batch import RunningBatch
from certdraft.data.targets import load_target, load_tokenizer
from certdraft.support import Progress, pack_linears, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MARK = "CERTDRAFT-USER-TURN"
_MAX_TRIES = 20  # times the number of prompts asked for
_REFILLS = 4  # turns of a batch for each place, one after another; a killed command loses a batch at most
_SHOWN = 60  # characters of a skipped prompt in the accounting


@dataclass(frozen=True)
class Sampling:
    """How user turns are sampled, and which are kept.

    Args:
        temperature: of the sampling; lower is more alike, higher is more broken.
        top_k: most probable tokens that are sampled from.
        top_p: share of the probability of these that is sampled from.
        max_new_tokens: longest turn; a turn that has not ended there is dropped.
        min_characters: shortest turn.
        batch_size: turns sampled side by side; four times as many make a batch, which is sampled whole.
        seed: of the sampling; the same seed gives the same prompts on the same machine.
        openings: text file of first words, one opening a line; turn after turn begins with the next one.
            Without it a model writes mostly what it was asked most often in its training.
    """

    temperature: float = 1.0
    top_k: int = 100
    top_p: float = 1.0
    max_new_tokens: int = 160
    min_characters: int = 16
    batch_size: int = 64
    seed: int = 0
    openings: str | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "max_new_tokens", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; give a number above 0.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling.top_p is {self.top_p}; give a share in (0, 1].")


def write_prompts(
    out: str,
    target: str = "embedded",
    count: int = 1000,
    sampling: Sampling = Sampling(),
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Accounting:
    """Let an instruct model write prompts, for when there are no chats to record.

    Real chats are better: a model's own prompts are narrower than those of its users. Killed at any moment,
    the same command goes on after the last batch it finished.

    Args:
        out: file to write, one {"prompt": ...} per line, to be read as any corpus.
        target: "embedded", a local folder, a GGUF file, or a hub name; it needs a chat template.
        count: prompts to write.
        sampling: how they are sampled, and which are kept.
        revision: hub revision of the target.
        dtype: dtype of the target's weights.

    Returns:
        How many turns were sampled, and why some were not kept.

    Raises:
        FileExistsError: `out` exists.
        ValueError: no chat template, an unfinished file of other settings, or turns hardly ever kept.
    """
    if count < 1:
        raise ValueError(f"count is {count}; give at least 1.")
    file = Path(out)
    if file.exists():
        raise FileExistsError(f"{file} exists already; remove it, or give another name.")
    file.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_target(target, revision=revision, dtype=getattr(torch, dtype), device=device)
    pack_linears(model)
    writer = _Writer(model, load_tokenizer(target, revision=revision), sampling)
    settings = {"target": target, "revision": revision, "dtype": dtype, **asdict(sampling)}
    settings["openings"] = writer.first_words  # what the file holds now
    settings["turns_a_batch"] = len(writer.given(0))
    journal = file.with_name(f".{file.name}.partial.json")
    batch = writer.resume(journal, settings)
    with Progress("writing prompts", count, "prompts") as progress:
        progress.advance(min(len(writer.prompts), count))
        while len(writer.prompts) < count:
            if writer.accounting.read >= _MAX_TRIES * count + 10 * sampling.batch_size:
                raise ValueError(
                    f"{len(writer.prompts)} of {count} prompts after {writer.accounting.read} sampled turns: "
                    f"{target} hardly ever ends a user's turn that can be kept.\n{writer.accounting}\nUse a "
                    "model trained on chats, other sampling settings, or a corpus of chats."
                )
            before = len(writer.prompts)
            tokens = writer.sample(batch)
            batch += 1
            progress.advance(min(len(writer.prompts), count) - before, tokens)
            state = {"settings": settings, "batches": batch, "prompts": writer.prompts}
            write_json(journal, state | {"accounting": writer.accounting.to_dict()})
    surplus = len(writer.prompts) - count
    if surplus:
        writer.accounting.used -= surplus
        writer.accounting.skip("more than asked for", writer.prompts[count][:_SHOWN], surplus)
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in writer.prompts[:count]]
    write_text(file, "".join(f"{line}\n" for line in lines))
    journal.unlink(missing_ok=True)
    print(f"{file}: {writer.accounting}", file=sys.stderr)
    return writer.accounting


class _Writer:
    """Samples batches of user turns and keeps those that pass the filters."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.opening, ends = _user_turn(tokenizer)
        self.first_words = _first_words(sampling, tokenizer)
        self.ends = sorted(eos_ids_of(model, tokenizer) | ends)
        self.prompts: list[str] = []
        self.accounting = Accounting("turns")
        self._keys: set[str] = set()

    def resume(self, journal: Path, settings: dict[str, Any]) -> int:
        """Read what an earlier, killed run has finished; returns the number of its batches."""
        if not journal.exists():
            return 0
        state = json.loads(journal.read_text(encoding="utf-8"))
        changed = [key for key, value in settings.items() if state["settings"].get(key) != value]
        if changed:
            raise ValueError(
                f"{journal} holds unfinished prompts with another {', '.join(changed)}; remove it to begin "
                "again, or give the same settings to go on."
            )
        self.prompts = state["prompts"]
        self._keys = {_key(prompt) for prompt in self.prompts}
        self.accounting = Accounting.from_dict(state["accounting"])
        return int(state["batches"])

    def sample(self, batch: int) -> int:
        """Sample one batch, seeded by its number; returns the number of tokens sampled."""
        seed, ends = self.sampling.seed * 1_000_003 + batch, frozenset(self.ends)
        turns = _sample_turns(self.model, self.opening, self.given(batch), ends, self.sampling, seed)
        for turn in turns:
            ended = turn[-1] in self.ends
            self._judge(np.array(turn[:-1] if ended else turn), ended)
        return sum(map(len, turns))

    def given(self, batch: int) -> list[list[int]]:
        """First tokens of every turn of a batch."""
        size, words = _REFILLS * self.sampling.batch_size, self.first_words
        return [words[turn % len(words)] for turn in range(batch * size, (batch + 1) * size)]

    def _judge(self, ids: Any, ended: bool) -> None:
        text = str(self.tokenizer.decode(ids)).strip()
        key = _key(text)
        self.accounting.read += 1
        if loop_onset(ids) is not None:
            reason = "repeats itself"
        elif not ended:
            reason = "did not end"
        elif len(text) < self.sampling.min_characters:
            reason = "too short"
        elif "\ufffd" in text or np.isin(ids, self.tokenizer.all_special_ids).any():
            reason = "broken characters or special tokens"
        elif key in self._keys:
            reason = "duplicate"
        else:
            self.accounting.used += 1
            self.prompts.append(text)
            self._keys.add(key)
            return
        self.accounting.skip(reason, repr(text[:_SHOWN]))


@torch.inference_mode()
def _sample_turns(
    model: PreTrainedModel,
    opening: list[int],
    given: Sequence[list[int]],
    ends: frozenset[int],
    sampling: Sampling,
    seed: int,
) -> list[list[int]]:
    """Token ids of one turn for each of `given`, its first tokens, up to its end; without `opening`.

    Turns that end make room for the next ones.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    room = len(opening) + sampling.max_new_tokens
    forward = partial(model, logits_to_keep=1)
    batch = RunningBatch(forward, model.config, model.device, sampling.batch_size, room)
    turns = [list(words) for words in given]
    waiting, live = deque(range(len(turns))), list[int]()
    tokens = torch.zeros(0, dtype=torch.long, device=model.device)  # that come next in each
    while waiting or live:
        new = [waiting.popleft() for _ in range(min(batch.free, len(waiting)))]
        if new:
            output = batch.join([np.array(opening + turns[turn]) for turn in new])
            drawn = _drawn(output.logits[:, -1], sampling, generator)
            tokens, live = torch.cat([tokens, drawn]), live + new
        else:
            drawn = tokens = _drawn(batch.step(tokens).logits[batch.rows, -1], sampling, generator)
        for turn, token in zip(new or live, drawn.tolist(), strict=True):
            turns[turn].append(token)
        stay = [
            row
            for row, turn in enumerate(live)
            if turns[turn][-1] not in ends and len(turns[turn]) < sampling.max_new_tokens
        ]
        if len(stay) < len(live):
            batch.keep(stay)
            tokens, live = tokens[stay], [live[row] for row in stay]
    return turns


def _drawn(logits: Float[Tensor, "N V"], sampling: Sampling, generator: torch.Generator) -> Int[Tensor, " N"]:
    """One token for each row of logits."""
    top = logits.float().topk(min(sampling.top_k, logits.shape[-1]))  # descending
    probs = (top.values / sampling.temperature).softmax(-1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= sampling.top_p, 0.0)
    return top.indices.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def _user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], frozenset[int]]:
    """Token ids up to the user's first word, and the special token that ends the turn, if there is one.

    Raises:
        ValueError: no chat template, or one that does not show the user's text.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the target's tokenizer has no chat template, so it was not trained on users' turns; use an "
            "instruct model, or a corpus of chats."
        )
    chat = [{"role": "user", "content": _MARK}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False))
    opening, found, closing = text.partition(_MARK)
    if not found:
        raise ValueError("the target's chat template does not show the user's text; use a corpus of chats.")
    first = tokenizer(closing, add_special_tokens=False)["input_ids"][:1]
    ends = frozenset(first) & frozenset([*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder])
    ids: list[int] = tokenizer(opening, add_special_tokens=False)["input_ids"]
    return ids, ends


def _first_words(sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of every opening in `sampling.openings`; one empty opening without a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no opening in it, or one that leaves no token to be sampled.
    """
    if sampling.openings is None:
        return [[]]
    file = Path(sampling.openings)
    if not file.is_file():
        raise FileNotFoundError(f"sampling.openings: there is no file {file}.")
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in lines if text]
    if not found:
        raise ValueError(f"sampling.openings: {file} is empty; write one opening a line.")
    longest = max(found, key=len)
    if len(longest) >= sampling.max_new_tokens:
        raise ValueError(
            f"sampling.openings: {str(tokenizer.decode(longest))!r} in {file} has {len(longest)} tokens, and "
            f"a turn ends at sampling.max_new_tokens={sampling.max_new_tokens}; shorten it, or raise that."
        )
    return found


def _key(text: str) -> str:
    """Keep letters and digits only: prompts that differ in case, spaces or marks count as one."""
    return "".join(character for character in text.casefold() if character.isalnum())
