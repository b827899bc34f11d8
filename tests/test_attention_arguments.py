"""window_attention: what each argument may be, and the sentences that refuse the rest."""

import re

import numpy as np
import operator_suite as suite
import pytest
import torch

from videoswin_kernels import window_attention


def test_dropout_drops_probabilities_and_scales_the_others():
    qkv = torch.zeros(2, 4, 6, 6, 3 * 16)
    qkv[..., 32:] = 1
    qkv.requires_grad_()
    table, options = torch.zeros(75, 2), {"window": (2, 3, 3), "num_heads": 2}
    torch.manual_seed(1)
    first = window_attention(qkv, table, dropout=0.25, **options)
    second = window_attention(qkv, table, dropout=0.25, **options)
    torch.manual_seed(1)
    assert torch.equal(window_attention(qkv, table, dropout=0.25, **options), first)
    assert not torch.equal(first, second)
    # Uniform weights: what a query receives is the number of keys it kept / N / keep.
    kept = first * 18 * 0.75
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
    assert first.mean().item() == pytest.approx(1, abs=0.05)
    # The same draw in the backward: all the weight given out by queries arrives at values.
    (grad_qkv,) = torch.autograd.grad(first.sum(), qkv)
    torch.testing.assert_close(grad_qkv[..., 32:].sum(), first.sum().detach())
    without = window_attention(qkv, table, dropout=0.0, **options)
    torch.testing.assert_close(without, torch.ones_like(without))


@suite.every("window_attention", compiled=True)
def test_fused_kernels_refuse_dropout(run):
    qkv, table = torch.zeros(1, 4, 6, 6, 96), torch.zeros(75, 2)
    options = {"window": (2, 3, 3), "num_heads": 2}
    sentence = suite.REFUSAL.format("window_attention", run.kernels)
    with pytest.raises(RuntimeError, match=sentence) as caught:
        run(window_attention, qkv, table, dropout=0.1, **options)
    assert "dropout" in str(caught.value)
    assert not run(window_attention, qkv, table, dropout=0.0, **options).any()


@suite.every("window_attention", compiled=True)
@pytest.mark.parametrize("width", [1, 8, 24, 48, 128])
def test_fused_kernels_refuse_other_head_widths(width, run):
    if run.kernels == "cpu":
        pytest.skip("kernels for processors take any width: test_cpu_kernels.py")
    qkv, table = torch.zeros(1, 4, 6, 6, 6 * width), torch.zeros(75, 2)
    sentence = suite.REFUSAL.format("window_attention", run.kernels)
    with pytest.raises(RuntimeError, match=sentence) as caught:
        run(window_attention, qkv, table, window=(2, 3, 3), num_heads=2)
    said = str(caught.value).partition("cannot run")[2]
    assert {str(width), "16", "32", "64"} <= set(re.findall(r"\d+", said)), said


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("qkv", torch.zeros(4, 6, 6, 24), (4, 6, 6, 24)),
        ("qkv", torch.zeros(1, 4, 6, 6, 24, dtype=torch.int64), torch.int64),
        ("qkv", None, "NoneType"),
        ("qkv|num_heads", torch.zeros(1, 4, 6, 6, 26), 26),
        ("qkv|num_heads", torch.zeros(1, 4, 6, 6, 9), 9),
        ("num_heads", 0, 0),
        ("num_heads", -2, -2),
        ("num_heads", 2.0, 2.0),
        ("num_heads", True, True),
        ("num_heads", None, None),
        ("bias_table", torch.zeros(25, 2), (25, 2)),
        ("bias_table", torch.zeros(75, 4), (75, 4)),
        ("bias_table", torch.zeros(75), (75,)),
        ("bias_table", torch.zeros(75, 2, dtype=torch.float64), torch.float64),
        ("bias_table", torch.zeros(75, 2, dtype=torch.bfloat16), torch.bfloat16),
        ("bias_table", torch.zeros(75, 2, device="meta"), "meta"),
        ("bias_table", None, "NoneType"),
        ("pad_qkv", torch.zeros(8), (8,)),
        ("pad_qkv", torch.zeros(1, 24), (1, 24)),
        ("pad_qkv", torch.zeros(24, device="meta"), "meta"),
        ("pad_qkv", 0.0, "float"),
        ("scale", "large", "large"),
        ("dropout", -0.1, -0.1),
        ("dropout", 1.5, 1.5),
        ("dropout", "half", "half"),
        ("window", (2, 3), (2, 3)),
        ("window", (2, 0, 3), (2, 0, 3)),
        ("window", (2, 3.0, 3), (2, 3.0, 3)),
        ("window", 3, 3),
        ("shift", (1, 1), (1, 1)),
        ("shift", (-1, 1, 1), (-1, 1, 1)),
        ("shift", (1, 3, 1), (1, 3, 1)),
        ("shift", (1, True, 1), (1, True, 1)),
        ("kernels", "flash", "flash"),
    ],
)
def test_refusals(argument, value, said):
    arguments = {"qkv": torch.zeros(1, 4, 6, 6, 24), "bias_table": torch.zeros(75, 2)}
    arguments |= {"window": (2, 3, 3), "shift": (1, 1, 1), "num_heads": 2}
    with suite.refuses("window_attention", argument, said):
        window_attention(**{**arguments, argument.partition("|")[0]: value})


def test_numbers_may_be_those_of_numpy():
    qkv, table = torch.randn(1, 2, 3, 3, 12), torch.randn(27, 2)
    plain = window_attention(qkv, table, window=(2, 2, 2), num_heads=2, scale=0.5)
    scalars = {"num_heads": np.int64(2), "scale": np.float32(0.5), "dropout": np.float64(0)}
    window = np.array([2, 2, 2])
    assert torch.equal(window_attention(qkv, table, window=window, **scalars), plain)
