"""DSpark folders written by hand: read for what they say, and refused where they say something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.models import drafter_layouts as layouts
from transformers import Qwen3Config, Qwen3ForCausalLM

from certdraft.drafters import DSparkDrafter, lint_export
from certdraft.drafters.dspark.export import read_dspark

V = layouts.V


def changed(layout: str, **keys: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config, weights = layouts.dspark(layout)
    return {k: v for k, v in (config | keys).items() if v is not KeyError}, weights


@pytest.mark.parametrize("layout", ["dspark", "deepspec", "speculators"])
def test_every_layout_says_the_same(tmp_path: Path, layout: str) -> None:
    config, vocab, weights = read_dspark(layouts.write(tmp_path / "out", *layouts.dspark(layout)))
    assert (config.target_layer_ids, config.block_size, config.mask_token_id) == (layouts.TAPS, 6, V - 1)
    assert (config.markov_rank, config.sample_from_anchor, vocab) == (5, True, V)
    assert (config.enable_confidence_head, config.confidence_head_with_markov) == (True, True)
    assert "markov_head.markov_w1.weight" in weights


@pytest.mark.parametrize(
    ("layout", "keys", "message"),
    [
        ("dspark", {"markov_head_type": "rnn"}, "markov_head_type 'rnn'; certdraft computes only 'vanilla'"),
        ("dspark", {"markov_rank": KeyError}, "lacks markov_rank"),
        ("deepspec", {"enable_confidence_head": KeyError}, "lacks enable_confidence_head"),
        ("dspark", {"dspark_bonus_anchor": True}, "must be true or false, and differ"),
        ("dspark", {"draft_vocab_size": 40}, "draft vocabulary 40 of 96"),
        ("dspark", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}, "layers with a window"),
        ("dspark", {"is_causal": True}, "keys that certdraft does not know: is_causal"),
        ("speculators", {"sample_from_anchor": KeyError}, "lacks sample_from_anchor"),
        ("speculators", {"conv_kernel_size": 3}, r"unknown keys \['conv_kernel_size'\]"),
    ],
)
def test_what_is_not_computed_is_refused(
    tmp_path: Path, layout: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_dspark(layouts.write(tmp_path / "out", *changed(layout, **keys)))


def test_copies_of_the_target_must_be_its_own(tmp_path: Path) -> None:
    """DeepSpec's folders hold embeddings and lm_head: compared, then left out."""
    sizes = {key: value for key, value in layouts.SIZES.items() if key not in ("rope_theta", "dtype")}
    torch.manual_seed(0)
    target = Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=layouts.LAYERS)).eval()
    config, weights = layouts.dspark("deepspec")
    ends = {"embed_tokens.weight": target.model.embed_tokens, "lm_head.weight": target.lm_head}
    weights |= {name: part.weight.detach().clone() for name, part in ends.items()}
    folder = layouts.write(tmp_path / "own", config, weights)
    assert lint_export(folder) == ()
    drafter = DSparkDrafter(pretrained=str(folder)).build(V, target)
    assert not any(name in drafter.state_dict() for name in ends)
    assert torch.equal(drafter.markov_head.markov_w2.weight, weights["markov_head.markov_w2.weight"])
    for name in ends:
        other = weights | {name: weights[name] + 1}
        folder = layouts.write(tmp_path / name, config, other)
        with pytest.raises(ValueError, match=f"brings {name}, which is not this target's"):
            DSparkDrafter(pretrained=str(folder)).build(V, target)
