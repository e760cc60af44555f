"""Problems asked as chats: what the models read, what a policy remembers, answers within a sentence."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import certdraft
from certdraft.arbitration import (
    ArbiterPolicy,
    ArbitrationEnv,
    ArbitrationSettings,
    Branches,
    Problem,
    always,
    load_policy,
    measure_arbitration,
    never,
    open_env,
    verify,
)
from certdraft.arbitration.mismatch_features import static_features
from certdraft.arbitration.tasks.problems import prompt_texts
from certdraft.data import embedded_target_path, load_tokenizer
from certdraft.support import PackedLinear, has_bfloat16_products
from certdraft.train.commands.cli import main
from certdraft.train.commands.export_command import export_run

CONFIGS = Path(certdraft.__file__).parent / "configs" / "collaboration"

PROBLEMS = [Problem("What is 2 + 2?", "4", "number"), Problem("Say yes.", "yes", "contains")]
TEXTS = ArbitrationSettings(depth=2, max_new_tokens=3, template="chat", system="Be brief.")


class Recorder:
    """A `Stepper` that keeps the prompts it is given and always says the same token."""

    def __init__(self, token: int, vocab: int) -> None:
        self.token, self.vocab = token, vocab
        self.prompts: list[list[int]] = []
        self.rows: list[int] = []

    def start(self, prompts: list[list[int]], copies: int) -> torch.Tensor:
        self.prompts += [list(prompt) for prompt in prompts]
        self.num = len(prompts) * copies
        return self._logits()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.num = len(tokens)
        return self._logits()

    def keep(self, rows: torch.Tensor) -> None:
        self.num = len(rows)

    def _logits(self) -> torch.Tensor:
        self.rows.append(self.num)
        return torch.nn.functional.one_hot(torch.full((self.num,), self.token), self.vocab).float()


def test_models_read_the_rendered_chat() -> None:
    tokenizer = load_tokenizer("embedded")
    target, drafter = (Recorder(token, len(tokenizer)) for token in (5, 6))
    env = ArbitrationEnv(target, drafter, tokenizer, TEXTS)
    env.write(PROBLEMS, never)
    expected = []
    for problem in PROBLEMS:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": problem.prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False)
        expected.append(list(ids["input_ids"] if not isinstance(ids, list) else ids))
    assert target.prompts == drafter.prompts == expected


def test_prompts_stand_as_they_are_without_a_template() -> None:
    assert prompt_texts(PROBLEMS, load_tokenizer("embedded")) == [p.prompt for p in PROBLEMS]


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; take an instruct"):
        prompt_texts(PROBLEMS, tokenizer, "chat")


def test_a_template_that_rejects_a_system_turn_is_named() -> None:
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*behind a system turn: no system here"):
        prompt_texts([Problem("?", "1", where="a.jsonl:2")], tokenizer, "chat", "Be brief.")


@pytest.mark.parametrize("setting", [{"system": "Be brief."}, {"thinking": True}])
def test_turns_without_a_chat_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError, match=r"set texts\.template to chat"):
        ArbitrationSettings(**setting)


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("Paris", "The capital of France is Paris.", True),
        ("paris", "PARIS", True),
        ("New Delhi", "It is New Delhi, I think", True),
        ("cold", "It is scolding", False),
        ("cold", "colder", False),
        ("C++", "C++.", True),
        ("c.t", "cat", False),
    ],
)
def test_an_answer_within_a_sentence(answer: str, response: str, right: bool) -> None:
    assert verify(Problem("?", answer, "contains"), response) is right


def test_arbitrate_asks_in_the_policys_own_chat_and_dtypes(tmp_path: Path) -> None:
    file, out = tmp_path / "problems.jsonl", tmp_path / "out.json"
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1), "check": "number"} for n in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    facts = {"target": "embedded", "drafter": "embedded", "target_dtype": "bfloat16", "texts": asdict(TEXTS)}
    ArbiterPolicy(0).save(tmp_path / "policy", facts)
    main(["arbitrate", "--policy", str(tmp_path / "policy"), "--problems", str(file), "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["texts"] == asdict(TEXTS)
    assert (found["target_dtype"], found["drafter_dtype"]) == ("bfloat16", "float32")


def test_both_dtypes_reach_the_models() -> None:
    env = open_env("embedded", "embedded", TEXTS, dtype="bfloat16", drafter_dtype="float32")
    assert (env.target.model.dtype, env.drafter.model.dtype) == (torch.bfloat16, torch.float32)  # type: ignore[attr-defined]


def test_lockstep_packs_linear_layers() -> None:
    env = open_env("embedded", "embedded", TEXTS, dtype="bfloat16")
    layers = [m for m in env.target.model.modules() if isinstance(m, torch.nn.Linear)]  # type: ignore[attr-defined]
    assert layers
    can_pack = has_bfloat16_products(torch.device("cpu"))
    assert {type(layer) is PackedLinear for layer in layers} == {can_pack}


# ---- memory, and the ceiling


def test_branches_share_no_larger_pass_than_asked() -> None:
    target, drafter = Recorder(1, 8), Recorder(2, 8)
    prompts = [[3, number] for number in range(6)]
    whole = Branches(Recorder(1, 8), Recorder(2, 8), max_new_tokens=3, eos=(), most=4)
    small = Branches(target, drafter, max_new_tokens=3, eos=(), most=4, texts_at_once=8)
    assert len(whole.roots(prompts)) == len(small.roots(prompts)) == 6
    assert len(whole) == len(small)
    assert max(target.rows) == 8


def test_many_mismatches_have_the_features_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(7, 96, generator=generator) for _ in range(2)]
    tokens = [each.argmax(-1) for each in logits]
    whole = static_features(*logits, tokens[1], tokens[0])
    monkeypatch.setattr("certdraft.arbitration.mismatch_features._ENTRIES_AT_ONCE", 200)
    assert torch.equal(static_features(*logits, tokens[1], tokens[0]), whole)


def test_the_ceiling_holds_every_arm() -> None:
    """Two overrides in a row are needed, more paths than are tried; the drafter's own text is one of them."""
    tokenizer = load_tokenizer("embedded")
    yes = tokenizer.encode("7", add_special_tokens=False)[0]
    no = tokenizer.encode("8", add_special_tokens=False)[0]
    settings = ArbitrationSettings(depth=4, max_new_tokens=3, look_ahead=True)
    env = ArbitrationEnv(
        Recorder(no, len(tokenizer)), Recorder(yes, len(tokenizer)), tokenizer, settings, eos=(0,)
    )
    problems = [Problem("?", "777", "number")]
    assert env.any_path(problems, 2)[0].tolist() == [False]
    result = measure_arbitration(env, always, problems, problems, max_paths=2)
    assert result.any_path.tolist() == [True]
    assert result.paths_cut == 0


# ---- the real pair's configs, on the embedded target


def test_a_drafter_is_fine_tuned_on_given_answers(tmp_path: Path) -> None:
    """Its labels are the corpus' own tokens, which the target would not write."""
    rows = [
        [("system", "Be brief."), ("user", f"What is {n} + 1?"), ("assistant", "zebra")] for n in range(64)
    ]
    chats = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in rows]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, chats)))
    main([
        "fit", "--config", str(CONFIGS / "drafter.yaml"), "--runs_dir", str(tmp_path / "runs"),
        "--model.drafter.init_args.from_target.layers=[0, 1]", "--data.record.target=embedded",
        f"--data.record.corpus.source={tmp_path / 'corpus.jsonl'}", f"--data.train={tmp_path / 'train'}",
        f"--data.validation={tmp_path / 'validation'}", "--data.record.prompts.thinking=true",
        "--trainer.max_steps=40",
        "--trainer.val_check_interval=40", "--data.batch_size=4", "--model.optimizer.lr=3e-3",
    ])  # fmt: skip
    (run,) = (tmp_path / "runs" / "drafter").iterdir()
    folder = export_run(str(run), str(tmp_path / "export"))
    env = open_env("embedded", str(folder), TEXTS)
    models = [stepper.model for stepper in (env.target, env.drafter)]  # type: ignore[attr-defined]
    prompt = env.tokenizer(prompt_texts([Problem("What is 9 + 1?", "?")], env.tokenizer, "chat", "Be brief."))
    answer = env.tokenizer.encode("zebra", add_special_tokens=False)
    ids = torch.tensor([[*prompt["input_ids"][0], *answer]])
    losses = [
        float(
            torch.nn.functional.cross_entropy(
                model(ids).logits[0, -len(answer) - 1 : -1], ids[0, -len(answer) :]
            )
        )
        for model in models
    ]
    assert losses[1] < losses[0] - 2.0
    assert torch.equal(*(model.get_input_embeddings().weight for model in models))


def test_a_policy_is_trained_on_chats(tmp_path: Path) -> None:
    file, test = tmp_path / "problems.jsonl", tmp_path / "test.jsonl"
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1), "check": "number"} for n in range(40)]
    file.write_text("\n".join(map(json.dumps, rows[:36])))
    test.write_text("\n".join(map(json.dumps, rows[36:])))
    main([
        "fit", "--config", str(CONFIGS / "policy.yaml"), "--runs_dir", str(tmp_path / "runs"),
        "--model.init_args.target=embedded", f"--data.init_args.source={file}",
        f"--model.init_args.drafter.init_args.pretrained={embedded_target_path()}",
        f"--model.init_args.export_dir={tmp_path / 'policy'}", f"--data.init_args.test_source={test}",
        "--data.init_args.held_out=0.5", "--model.init_args.drafter.init_args.dtype=float32",
        "--model.init_args.texts.max_new_tokens=3", "--trainer.max_steps=2", "--data.init_args.batch_size=4",
        "--trainer.val_check_interval=2", "--checkpoint.every_n_train_steps=2",
    ])  # fmt: skip
    facts = load_policy(tmp_path / "policy").facts
    assert (facts["texts"]["template"], facts["texts"]["system"]) == ("chat", "Give only the answer.")
    assert (facts["target_dtype"], facts["drafter_dtype"]) == ("bfloat16", "float32")
