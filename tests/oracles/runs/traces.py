"""Whether two traces are equal to rounding."""

from pathlib import Path

import numpy as np

from certdraft.data import open_trace


def assert_same_trace(a: Path, b: Path, every_step: bool = False) -> None:
    """Assert equal ids and masks, and top-k logits equal to rounding where learned, or everywhere."""
    left, right = open_trace(a, verify="full"), open_trace(b, verify="full")
    assert len(left) == len(right)
    for index in range(len(left)):
        x, y = left.columns(index), right.columns(index)
        assert np.array_equal(x.input_ids, y.input_ids)
        assert np.array_equal(x.loss_mask, y.loss_mask)
        steps = np.arange(len(x.input_ids) - 1) if every_step else x.loss_mask
        assert np.array_equal(x.top_ids[steps, 0], y.top_ids[steps, 0])
        np.testing.assert_allclose(x.top_gap[steps], y.top_gap[steps], rtol=2**-9, atol=2e-3)
        np.testing.assert_allclose(x.lse_gap[steps], y.lse_gap[steps], rtol=1e-4, atol=2e-5)
        same = x.top_ids[steps] == y.top_ids[steps]  # near-ties may change places
        assert same.mean() > 0.99


def assert_same_features(a: Path, b: Path) -> None:
    """Assert equal features within bf16, but at a last token that one target never read (zeros)."""
    left, right = open_trace(a, verify="full"), open_trace(b, verify="full")
    assert left.meta.feature_layers == right.meta.feature_layers
    for index in range(len(left)):
        x, y = left.row(index).features.float().numpy(), right.row(index).features.float().numpy()
        assert x.shape == y.shape
        tokens = len(x) if x[-1].any() and y[-1].any() else len(x) - 1
        np.testing.assert_allclose(x[:tokens], y[:tokens], rtol=2**-6, atol=2**-8)
