"""Compiled kernel sets: who is asked, what each refuses, and where `auto` takes none of them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import operator_suite as suite
import pytest
import torch
from model_suite import error, golden_case
from test_declared import Calls
from test_golden import backward, parameters_of, torchvisions

from model import SwinTransformer3D
from videoswin_kernels import window_attention

ARITHMETIC = [name for name in suite.OPERATORS if name not in suite.MOVEMENT]
ATTENDS = suite.every("window_attention", compiled=True)


@pytest.mark.parametrize("operator", suite.OPERATORS)
def test_triton_is_asked_wherever_it_can_run(operator):
    """A set that breaks at import must not slip out of the suite as one that is not there."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    if device not in suite.DEVICES:
        pytest.skip("Triton's interpreter is off and there is no GPU")
    assert suite.Run("triton", device) in suite.runs(operator)


def test_the_emulated_cuda_kernels_are_asked_wherever_they_are_built():
    if not (Path(__file__).parents[1] / "videoswin_kernels/_emulated.so").exists():
        pytest.skip("the C++ library is not built")
    for operator in suite.OPERATORS:
        if operator != "window_attention":
            assert suite.Run("cuda", "cpu") in suite.runs(operator)


@suite.every("residual_norm", compiled=True)
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("operator", ARITHMETIC)
def test_a_dtype_is_taken_or_refused_in_one_sentence(operator, dtype, run):
    suite.skip_absent(operator, run)
    if dtype in run.dtypes(operator):
        suite.smallest_call(operator, run.kernels, run.device, dtype)
        return
    sentence = suite.REFUSAL.format(operator, run.kernels)
    with pytest.raises(RuntimeError, match=sentence) as caught:
        suite.smallest_call(operator, run.kernels, run.device, dtype)
    assert str(dtype).removeprefix("torch.") in str(caught.value)


@suite.every("residual_norm", compiled=True)
@pytest.mark.parametrize("operator", ARITHMETIC)
def test_a_refusal_under_compile_is_the_same_sentence(operator, run):
    suite.skip_absent(operator, run)
    if torch.float64 in run.dtypes(operator):
        pytest.skip(f"{run.kernels} takes float64")

    def function():
        return suite.smallest_call(operator, run.kernels, run.device, torch.float64)

    with pytest.raises(RuntimeError) as caught:
        function()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot run") as traced:
        torch.compile(function, backend="eager", fullgraph=True)()
    assert str(caught.value) in str(traced.value)
    torch._dynamo.reset()


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
@pytest.mark.parametrize("operator", suite.OPERATORS)
def test_auto_takes_no_kernels_of_a_gpu_for_cpu_tensors(operator, kernels):
    with Calls(kernels) as calls:
        suite.smallest_call(operator, "auto")
    assert not calls.names


@ATTENDS
def test_auto_trains_on_a_gpu(run):
    if run.device != "cuda":
        pytest.skip("auto takes compiled kernels on CUDA tensors alone")
    with Calls(run.kernels) as calls:
        suite.smallest_call("window_attention", "auto", "cuda", grad=True).sum().backward()
    assert calls.names == ["window_attention", "window_attention_backward"]


@ATTENDS
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_attention_runs_in_every_grad_mode(context, run):
    qkv = run.leaf(suite.random(2, 3, 4, 5, 96, dtype=torch.float32, grad=True))
    table = run.put(torch.randn(75, 2))
    options = {"window": (2, 3, 3), "shift": (1, 1, 1), "num_heads": 2}
    expected = window_attention(qkv, table, kernels="reference", **options).detach()
    with context():
        result = window_attention(qkv, table, kernels=run.kernels, **options)
    assert result.requires_grad == (context is torch.enable_grad)
    torch.testing.assert_close(result.detach().clone(), expected, rtol=1e-4, atol=1e-5)


@ATTENDS
@pytest.mark.parametrize(
    "case",
    [pytest.param("padded_8x7x7", marks=pytest.mark.slow), "odd_video", "clamped_spatial"],
)
def test_the_golden_cases(case, run):
    """The output and every stored gradient within twice the error of torchvision's."""
    config, tensors = golden_case(case)
    backbone = SwinTransformer3D(**config, kernels=run.kernels)
    backbone.load_state_dict(parameters_of(tensors))
    backbone.eval().to(run.device)
    clips = tensors["input"].clone().requires_grad_()
    with Calls(run.kernels) as calls:
        features = backbone(clips.to(run.device)).cpu()
        got = backward(features, clips, tensors, backbone.get_parameter)
    # Two stages of two blocks with a merging between, and nothing that fell back.
    for suffix in ("", "_backward"):
        for name, count in [("window_attention", 4), ("residual_norm", 4), ("patch_merging", 1)]:
            assert calls.names.count(name + suffix) == count, name + suffix
    theirs, rounding = torchvisions(case), torch.finfo(torch.float32).eps
    for key, value in got.items():
        budget = 2 * error(theirs[key], tensors[key]) + rounding
        assert error(value.cpu(), tensors[key]) <= budget, key


def test_an_operator_reached_around_the_selection_refuses_bfloat16_interpreted():
    if not suite.Run("triton", "cpu").is_interpreted:
        pytest.skip("Triton is not interpreted")
    x, weight = torch.ones(1, 1, 2, 2, 16, dtype=torch.bfloat16), torch.ones(64)
    with pytest.raises(
        RuntimeError, match=r"_kernel: Triton's interpreter computes bfloat16 wrong"
    ):
        torch.ops.videoswin_triton.patch_merging(x, weight, weight, 1e-5, x.dtype)
    # Moved as integers, it is only moved.
    assert torch.equal(torch.ops.videoswin_triton.cyclic_shift(x, [0, 1, 0]), x)


def test_an_operator_reached_around_the_selection_names_what_it_needs():
    program = (
        "import torch, videoswin_kernels; "
        "torch.ops.videoswin_triton.cyclic_shift(torch.ones(1, 1, 2, 2, 4), [0, 1, 0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stderr.splitlines()[-1]
    assert re.search(r"gather_rows_kernel: Triton's kernels run on CUDA tensors .*; move", said), (
        said
    )
