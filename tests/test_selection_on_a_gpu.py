"""What is chosen for CUDA tensors, told to a machine that may have none."""

import pytest
import torch

from videoswin_kernels import selection
from videoswin_kernels.selection import Call, UnavailableError, choose

compiler = pytest.importorskip("videoswin_kernels.triton._compiler")
OPERATOR = pytest.mark.parametrize("operator", selection.OPERATORS)
ARITHMETIC = ("window_attention", "patch_merging", "residual_norm")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0, on which Triton compiles."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(compiler, "IS_INTERPRETED", False)
    monkeypatch.setattr(compiler, "why_not_started", lambda: None)
    return monkeypatch


def refusal(call, kernels):
    """The sentence of a refusal."""
    with pytest.raises(UnavailableError) as caught:
        choose(call, kernels)
    return str(caught.value)


@OPERATOR
@pytest.mark.parametrize("kernels", ["auto", "fused", "triton"])
@pytest.mark.parametrize("dtype", selection.DTYPES)
def test_triton_comes_first_and_says_that_no_row_earned_it(operator, kernels, dtype, gpu):
    choice = choose(Call(operator, "cuda", 0, (dtype,)), kernels)
    assert choice.kernels == "triton"
    assert choice.row is None


def test_auto_leaves_attention_to_the_reference_while_it_has_no_gradient(gpu):
    for operator in selection.OPERATORS:
        choice = choose(Call(operator, "cuda", 0, needs_grad=True), "auto")
        is_left = ("triton", operator) in selection.FORWARD_ONLY
        assert choice.kernels == ("reference" if is_left else "triton")
        assert not is_left or "no gradient yet" in choice.reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtypes": (torch.float64,)}, "float64"),
        ({"dtypes": (torch.float16, torch.float64)}, "float64"),
        ({"head_width": 24}, "24"),
        ({"head_width": None}, "another"),
        ({"has_dropout": True}, "dropout"),
    ],
)
def test_what_no_kernel_takes_is_left_to_the_reference_or_refused(change, said, gpu):
    call = Call("window_attention", "cuda", 0)._replace(**change)
    choice = choose(call, "auto")
    assert choice.kernels == "reference"
    assert said in choice.reason
    for kernels in ("fused", "triton"):
        assert said in refusal(call, kernels)


@OPERATOR
def test_movement_takes_any_dtype(operator, gpu):
    call = Call(operator, "cuda", 0, (torch.complex128,))
    is_movement = operator not in ARITHMETIC
    assert (choose(call, "auto").kernels == "triton") == is_movement


@OPERATOR
@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        (torch.cuda, "is_available", lambda: False, "no CUDA GPU"),
        (torch.cuda, "get_device_capability", lambda index=None: (7, 5), r"8\.0, this has 7\.5"),
        (compiler, "VERSION", (3, 5), r"3\.6 or newer is needed, 3\.5 is installed"),
        (compiler, "IS_INTERPRETED", True, "TRITON_INTERPRET is set"),
        (compiler, "why_not_started", lambda: "Triton cannot start: no cc", "no cc"),
        (selection, "find_spec", lambda name: None, "pip install triton"),
    ],
)
def test_a_machine_that_cannot_run_triton_says_why(operator, owner, name, value, said, gpu):
    gpu.setattr(owner, name, value)
    call = Call(operator, "cuda", 0)
    assert choose(call, "auto").kernels == "reference"
    for kernels in ("fused", "triton"):
        with pytest.raises(UnavailableError, match=rf"^{operator}: .*{said}"):
            choose(call, kernels)


def test_a_driver_that_does_not_start_is_a_reason_and_no_crash():
    if torch.cuda.is_available():
        pytest.skip("Triton starts here")
    assert compiler.why_not_started().startswith("Triton cannot start: ")
