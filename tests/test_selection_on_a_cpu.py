"""kernels="cpu": chosen for all CPU tensors, refused elsewhere, and missed in one sentence."""

import itertools
import re

import operator_suite as suite
import pytest
import torch
from test_cpu_exponentials import at_level
from test_declared import Calls

from videoswin_kernels import extension, window_attention
from videoswin_kernels.selection import Call, UnavailableError, choose

OPERATOR = pytest.mark.parametrize("operator", suite.OPERATORS)
needs_library = pytest.mark.skipif(
    extension.why_not("_ops_cpu") is not None, reason=str(extension.why_not("_ops_cpu"))
)


@needs_library
@OPERATOR
@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
def test_fused_and_auto_are_cpu_on_cpu_tensors(operator, dtype):
    widths = (None, 1, 7, 32, 48)
    words = ("fused",) if extension.cpu_level() == "baseline" else ("fused", "auto")
    for word, width, is_too_wide in itertools.product(words, widths, (False, True)):
        call = Call(operator, dtypes=(dtype,), head_width=width, is_too_wide=is_too_wide)
        assert choose(call, word).kernels == "cpu"
    with Calls("cpu") as calls:
        suite.smallest_call(operator, "fused", dtype=dtype)
    assert calls.names == [operator]


@needs_library
def test_dropout_is_refused_with_a_cure_and_auto_takes_the_reference():
    qkv, table = torch.randn(1, 3, 5, 7, 42), torch.randn(75, 2)
    options = {"window": (2, 3, 3), "num_heads": 2, "dropout": 0.1}
    for word in ("cpu", "fused"):
        refusal = suite.REFUSAL.format("window_attention", word)
        with pytest.raises(UnavailableError, match=refusal) as caught:
            window_attention(qkv, table, kernels=word, **options)
        assert "its kernels have no dropout of attention weights" in str(caught.value)
    with Calls("cpu") as calls:
        window_attention(qkv, table, kernels="auto", **options)
    assert calls.names == []


@OPERATOR
@pytest.mark.parametrize("device", ["cpu", "meta", "cuda", "xpu"])
def test_auto_never_refuses(operator, device, monkeypatch):
    for why, has_dropout in itertools.product((None, "it is not there"), (False, True)):
        monkeypatch.setattr(extension, "why_not", lambda name, why=why: why)
        call = Call(operator, device, None, (torch.float64,), 7, has_dropout, True)
        chosen = choose(call, "auto").kernels
        if device == "cpu":
            assert chosen == ("reference" if why or has_dropout else "cpu")


@OPERATOR
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_tensors_of_another_device_are_refused_in_one_sentence(operator, device):
    with pytest.raises(UnavailableError, match=suite.REFUSAL.format(operator, "cpu")) as caught:
        choose(Call(operator, device), "cpu")
    assert f"run on CPU tensors, got {device}; use" in str(caught.value)
    assert not re.search(r"\. [A-Z]|\n", str(caught.value))


@needs_library
@OPERATOR
def test_where_the_library_is_absent_whoever_calls_is_told(operator, monkeypatch):
    with Calls("cpu") as calls:
        suite.smallest_call(operator, "cpu")
    arguments = calls.only(operator)
    monkeypatch.setattr(extension, "why_not", lambda name: f"{name} is not built; build it")
    refusal = suite.REFUSAL.format(operator, "cpu")
    with pytest.raises(UnavailableError, match=refusal) as by_name:
        choose(Call(operator), "cpu")
    # Around the selection, as an exported program does.
    with pytest.raises(UnavailableError, match=refusal) as around:
        getattr(torch.ops.videoswin_cpu, operator)(**arguments)
    assert str(around.value) == str(by_name.value)
    assert "cannot run: _ops_cpu is not built; build it; use" in str(around.value)


@needs_library
@OPERATOR
def test_auto_stays_with_the_reference_where_nobody_has_measured_the_level(operator):
    with at_level("baseline"):
        found = choose(Call(operator), "auto")
        assert found.kernels == "reference"
        assert "AVX2" in found.reason
        assert choose(Call(operator), "fused").kernels == "cpu"
