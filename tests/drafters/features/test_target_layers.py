"""Layer numberings: every one there and back, and against what engines default to."""

import pytest

from certdraft.drafters.features.target_layers import OFFSETS, check_layers, convert


@pytest.mark.parametrize("numbering", OFFSETS)
def test_there_and_back(numbering: str) -> None:
    taps = (0, 2, 7, 33)
    assert convert(convert(taps, "tap", numbering), numbering, "tap") == taps  # type: ignore[arg-type]


def test_defaults_of_engines_are_the_same_layers() -> None:
    """The three defaults that engines' sources write down for a target of 36 layers."""
    n = 36
    assert convert((2, n // 2, n - 3), "hidden_states", "tap") == (1, n // 2 - 1, n - 4)
    assert convert((1, n // 2 - 1, n - 4), "tensorrt_llm", "sglang") == (1, 17, 32)
    # OpenVINO's own default, read as its own numbering, is another set of layers: the known off-by-one.
    assert convert((2, n // 2, n - 3), "openvino", "hidden_states") == (3, 19, 34)
    assert convert((1, 9, 17, 25, 33), "dflash", "speculators") == (2, 10, 18, 26, 34)


def test_embeddings_are_no_layer() -> None:
    with pytest.raises(ValueError, match="not the embeddings"):
        convert((0, 4), "hidden_states", "tap")


@pytest.mark.parametrize("taps", [(), (-1, 2), (2, 2), (3, 1)])
def test_taps_that_engines_would_reorder(taps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending order"):
        check_layers(taps)


def test_last_layer() -> None:
    assert check_layers((0, 6), 8) == (0, 6)
    with pytest.raises(ValueError, match="0 to 6 can be read"):
        check_layers((0, 7), 8)
