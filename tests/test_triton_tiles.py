"""Tiles that the launchers cut for other GPUs than the one they find, or are interpreted as."""

import operator_suite as suite
import pytest
import torch
from test_attention import attend, exactly, make, naive
from test_attention_backward import TILES, check

from videoswin_kernels.testing import HEAD_WIDTHS

compiler = pytest.importorskip("videoswin_kernels.triton._compiler")
from videoswin_kernels.triton import attention, attention_backward  # noqa: E402

CHOICES = {
    attention.configuration,
    attention_backward.query_configuration,
    attention_backward.key_configuration,
    attention_backward.bias_configuration,
}


@suite.every("window_attention", [torch.float16], compiled=True)
@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_attention_in_the_tiles_of_an_older_gpu(width, run, dtype, monkeypatch):
    if run.kernels != "triton":
        pytest.skip("the tiles of Triton's kernels")
    asked = dtype, TILES.tokens, width
    # Else this would be what all other tests run.
    assert any(choose(80, *asked) != choose(90, *asked) for choose in CHOICES)
    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "architecture", lambda x: 80)
    inputs = make(TILES, 1, dtype=dtype, width=width, grad=True)
    exact = exactly([suite.exact_leaf(value) for value in inputs], TILES)
    suite.assert_budget(attend(run, inputs, TILES), exact, naive(run, inputs, TILES))
    check(run, inputs, TILES)
