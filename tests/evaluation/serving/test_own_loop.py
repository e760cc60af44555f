"""Our loop beside a server, on the embedded target: the rounds of live decoding; ties told from faults."""

from pathlib import Path

import pytest
import torch

from certdraft.data import load_target, load_tokenizer, tokenizer_fingerprint
from certdraft.decoding import Chain, TargetRunner, decode, greedy
from certdraft.drafters import CardFacts, CausalDrafter, export, load_drafter
from certdraft.evaluation.serving.bench_summary import summarise
from certdraft.evaluation.serving.engine_counters import Counters
from certdraft.evaluation.serving.own_loop import replay_served
from certdraft.evaluation.serving.served_passes import Pass
from certdraft.evaluation.serving.served_requests import Answer

DEPTH, NEW = 3, 24


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target's first two layers, without training: sometimes accepted."""
    model, tokenizer = load_target(), load_tokenizer()
    config = model.config.to_dict() | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    made = CausalDrafter(config, vocab_size=model.config.vocab_size)
    state = {k: v for k, v in model.state_dict().items() if k in made.model.state_dict()}
    made.model.load_state_dict(state)
    card = CardFacts("embedded", model.config.vocab_size, tokenizer_fingerprint(tokenizer))
    folder = tmp_path_factory.mktemp("own") / "drafter"
    return export(made.eval(), folder, tokenizer=tokenizer, draft_length=DEPTH, card=card)


@pytest.fixture(scope="module")
def answers(drafter: Path) -> list[Answer]:
    """What a server would stream: a part for each round behind the first token."""
    model, tokenizer = load_target(), load_tokenizer()
    loaded, found = load_drafter(drafter, target=model), []
    for number, text in enumerate(("def main():\n    ", "import os\n\nclass A", "for i in range(", "x = [")):
        prompt = tokenizer(text).input_ids
        ids = greedy(TargetRunner(model), prompt, NEW)
        rounds = decode(model, loaded, [*prompt, ids[0]], Chain(DEPTH), max_new_tokens=NEW - 1).rounds
        sizes = [1.0, *(float(r.committed) for r in rounds)]
        times = [0.1 * (at + 1) for at in range(len(sizes))]
        found.append(Answer(number, prompt, ids, "", NEW, times, sizes, times[-1]))
    return found


def test_the_rounds_are_those_of_live_decoding(drafter: Path, answers: list[Answer]) -> None:
    own = replay_served(answers, [], "embedded", str(drafter), DEPTH, dtype="float32", device="cpu")
    assert own.lengths.passes == [len(a.times) - 1 for a in answers]
    assert own.lengths.tokens == [NEW - 1] * len(answers)
    rounds, accepted = sum(own.lengths.passes), sum(own.lengths.accepted)
    assert 0 < accepted < DEPTH * rounds
    counters = Counters("vllm", 4 * NEW, 0, rounds, DEPTH * rounds, accepted, tuple(own.lengths.accepted))
    found = summarise({("drafter", 1): [Pass(1.0, answers, counters)]}, own)
    assert found["own_loop"]["agrees"] is True
    assert found["own_loop"]["served_minus_own"]["value"] == 0
    assert found["own_loop"]["tau"] == found["levels"][0]["tau"]
    # A drafter that was read wrongly is accepted less often in the engine.
    worse = [
        Answer(a.prompt, a.prompt_ids, a.ids, "", NEW, [0.1 * n for n in range(1, NEW + 1)], [1.0] * NEW, 3.0)
        for a in answers
    ]
    counters = Counters("vllm", 4 * NEW, 0, 4 * (NEW - 1), DEPTH * 4 * (NEW - 1), 0, (0, 0, 0))
    found = summarise({("drafter", 1): [Pass(1.0, worse, counters)]}, own)
    assert found["own_loop"]["agrees"] is False
    assert any("may be read wrongly" in warning for warning in found["warnings"])


def test_a_text_that_differs_is_a_tie_or_a_fault(drafter: Path, answers: list[Answer]) -> None:
    first = answers[0]
    wrong = [*first.ids[:5], (first.ids[5] + 1) % 100, *first.ids[6:]]
    other = Answer(0, first.prompt_ids, wrong, "", NEW, first.times, first.sizes, 1.0)
    own = replay_served(
        answers, [(first, other)], "embedded", str(drafter), DEPTH, dtype="float32", device="cpu"
    )
    assert own.differences[0, 5]["tie"] is False
    model = load_target()
    logits = model(torch.tensor([[*first.prompt_ids, *first.ids[:5]]])).logits[0, -1]
    lead = float(logits[first.ids[5]] - logits[wrong[5]])
    assert own.differences[0, 5]["target_lead"] == pytest.approx(lead, abs=1e-3)
    counters = Counters("vllm", 4 * NEW, 0, 8, 0, 0, (0, 0, 0))
    passes = {
        ("drafter", 1): [Pass(1.0, [other, *answers[1:]], counters)],
        ("plain", 1): [Pass(1.0, answers, counters)],
    }
    found = summarise(passes, own)
    says = {check["check"]: check["says"] for check in found["checks"]}["same texts"]
    assert "1 requests: 1 of 4" in says
    assert "0 of 1 where the target's logits are tied" in says


def test_texts_without_ids_are_refused(answers: list[Answer]) -> None:
    silent = Answer(0, [], [], "text", 4, [0.1], [4.0], 0.1)
    with pytest.raises(ValueError, match="no token ids"):
        replay_served([silent], [], "embedded", "drafter", DEPTH)
    short = Answer(0, [1], [2], "t", 1, [0.1], [1.0], 0.1)
    with pytest.raises(ValueError, match="--max_new_tokens"):
        replay_served([short], [], "embedded", "drafter", DEPTH)
