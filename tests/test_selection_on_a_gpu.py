"""What is chosen for CUDA tensors, told to a machine that may have none."""

from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from videoswin_kernels import extension, selection
from videoswin_kernels.selection import Call, UnavailableError, choose

compiler = pytest.importorskip("videoswin_kernels.triton._compiler")
OPERATOR = pytest.mark.parametrize("operator", selection.OPERATORS)
ARITHMETIC = ("window_attention", "patch_merging", "residual_norm")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0, on which Triton compiles; the C++ library is not built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(compiler, "IS_INTERPRETED", False)
    monkeypatch.setattr(compiler, "why_not_started", lambda: None)
    monkeypatch.setattr(extension, "why_not", lambda library: f"{library} is not built")
    monkeypatch.setattr(extension, "why_not_started", lambda index: None)
    return monkeypatch


def absent(name):
    raise PackageNotFoundError(name)


def broken(name):
    raise ImportError("libtriton.so")


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


class Part(torch.nn.Linear):
    """An attention as a model has it: explain reads its attributes."""

    operator, kernels, head_width, attn_drop = "window_attention", "auto", 32, 0.1


def test_explain_says_what_a_module_would_run_now(gpu):
    part, example = Part(2, 2), torch.empty(0, device="meta")
    gpu.setattr(selection, "_place", lambda example: ("cuda", 0, (torch.float16,)))

    def chosen():
        (choice,) = selection.explain(part, example)
        return choice.kernels

    with torch.no_grad():
        assert chosen() == "reference", "training drops attention weights"
        part.eval()
        assert chosen() == "triton"
        part.head_width = 24
        assert chosen() == "reference"
        part.head_width = 32
    assert chosen() == "triton", "with gradients as without"


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
        (selection, "version", lambda name: "3.5.1", r"3\.6 or newer .*, 3\.5\.1 is installed"),
        (selection, "version", absent, "pip install triton"),
        (selection, "import_module", broken, "cannot be imported: libtriton"),
        (torch.version, "hip", "6.4", "ROCm"),
        (compiler, "IS_INTERPRETED", True, "TRITON_INTERPRET is set"),
        (compiler, "why_not_started", lambda: "Triton cannot start: no cc", "no cc"),
    ],
)
def test_a_machine_that_cannot_run_triton_says_why(operator, owner, name, value, said, gpu):
    gpu.setattr(owner, name, value)
    call = Call(operator, "cuda", 0)
    assert choose(call, "auto").kernels == "reference"
    for kernels in ("fused", "triton"):
        with pytest.raises(UnavailableError, match=rf"^{operator}: .*{said}"):
            choose(call, kernels)


@OPERATOR
@pytest.mark.parametrize("dtype", selection.DTYPES)
def test_cuda_comes_first_for_attention_else_second_and_needs_its_library(operator, dtype, gpu):
    call = Call(operator, "cuda", 0, (dtype,))
    assert "_ops is not built" in refusal(call, "cuda")
    assert choose(call, "fused").kernels == "triton"
    gpu.setattr(extension, "why_not", lambda library: None if library == "_ops" else "not here")
    first = "cuda" if operator == "window_attention" else "triton"
    for kernels in ("auto", "fused"):
        assert choose(call, kernels).kernels == first
    gpu.setattr(selection, "version", absent)
    for kernels in ("auto", "fused", "cuda"):
        choice = choose(call, kernels)
        assert choice.kernels == "cuda"
        assert choice.row is None
        is_second = kernels != "cuda" and first == "triton"
        assert ("pip install triton" in choice.reason) == is_second


@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        (torch.cuda, "is_available", lambda: False, "no CUDA GPU"),
        (torch.cuda, "get_device_capability", lambda index=None: (7, 5), r"8\.0, this has 7\.5"),
        (torch.version, "hip", "6.4", "ROCm"),
        (extension, "why_not", lambda library: "it was built without CUDA", "without CUDA"),
        (extension, "why_not_started", lambda index: "no code for it", "no code for it"),
    ],
)
def test_a_machine_that_cannot_run_cuda_says_why(owner, name, value, said, gpu):
    gpu.setattr(extension, "why_not", lambda library: None)
    call = Call("residual_norm", "cuda", 0)
    assert choose(call, "cuda").kernels == "cuda"
    gpu.setattr(owner, name, value)
    with pytest.raises(UnavailableError, match=rf"^residual_norm: kernels='cuda' .*{said}"):
        choose(call, "cuda")


def test_a_driver_that_does_not_start_is_a_reason_and_no_crash():
    if torch.cuda.is_available():
        pytest.skip("Triton starts here")
    assert compiler.why_not_started().startswith("Triton cannot start: ")


def test_a_gpu_is_asked_once_whether_the_library_starts_on_it(monkeypatch):
    if torch.cuda.is_available() or extension.build_facts("_ops").get("cuda") is None:
        pytest.skip("takes CUDA kernels where there is no GPU")
    devices = []
    monkeypatch.setattr(torch.cuda, "device", lambda i: nullcontext(devices.append(i)))
    monkeypatch.setattr(extension, "_started", {})
    for _ in range(2):
        said = extension.why_not_started(3)
        # What CUDA's own runtime says where there is no driver.
        assert said.startswith("the C++ library cannot start on it: CUDA driver version is insuff")
    assert devices == [3]
