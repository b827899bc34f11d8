"""docs/support.md: it is what the code answers, and every answer is what a call gets."""

import re
from functools import partial
from pathlib import Path

import operator_suite as suite
import pytest
import torch

from videoswin_kernels import (
    cyclic_shift,
    patch_merging,
    residual_norm,
    selection,
    support,
    window_attention,
    window_partition,
    window_reverse,
)

ROOT = Path(__file__).parents[1]
KERNELS = pytest.mark.parametrize("kernels", support.KERNEL_SETS)
# Height is padded, width padded and shifted.
WINDOW = {"window": (2, 2, 2), "shift": (0, 0, 1)}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_page_is_what_the_code_says():
    said = "run python -m videoswin_kernels --support > docs/support.md"
    assert read("docs/support.md") == support.page(), said


def test_the_page_is_the_same_on_a_machine_with_a_gpu_and_without_libraries(
    no_libraries, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not suite.DEVICES[1:])
    assert read("docs/support.md") == support.page()


def test_architectures_are_those_of_the_build_and_of_the_tests():
    (built,) = re.findall(r'set\(VIDEOSWIN_ARCHITECTURES "(.*?)"', read("CMakeLists.txt"))
    assert tuple(built.split(";")) == support.CUDA_ARCHITECTURES
    (shared,) = re.findall(r"^SHARED = \{(.*)\}", read("tests/test_triton_compiles.py"), re.M)
    compiled = tuple(int(number) for number in re.findall(r"(\d+):", shared))
    assert compiled == support.TRITON_ARCHITECTURES
    program = read("tests/triton_compile.py")
    half = program.partition("def launches_of_a_model")[2].partition("\ndef ")[0]
    assert re.findall(r"attend\(case, (\d+)", half) == [str(support.COMPILED_WIDTH)]


def call_of(case, dtype):
    """A call of what a row says in words: its function and its tensors.

    Gradients of wide rows' weights take Triton's interpreter seconds: asked for in float32 alone.
    """

    def make(*shape, is_slow=False):
        values = suite.anything(*shape, dtype=dtype)
        needs = dtype.is_floating_point and not (is_slow and dtype in suite.LOW)
        return values.requires_grad_(needs)

    operator, x, is_wide = case.operator, (1, 2, 3, 3, 12), case.which.startswith("wider")
    if operator == "cyclic_shift":
        return partial(cyclic_shift, shift=(1, 0, -1)), [make(*x)]
    if operator == "window_partition":
        return partial(window_partition, **WINDOW), [make(*x)]
    if operator == "window_reverse":
        return partial(window_reverse, grid=x[1:4], **WINDOW), [make(4, 8, 12)]
    if operator == "window_attention":
        width = 24 if case.which == "another head width" else int(case.which.split()[-1])
        inputs = [make(*x[:4], 3 * width), make(27, 1), make(3 * width)]
        return partial(attend, num_heads=1), inputs
    make_weight = partial(make, is_slow=is_wide)
    if operator == "patch_merging":
        width = 2056 if is_wide else 12
        x = make(1, 1, 2, 1, width)
        return patch_merging, [x, make_weight(4 * width), make_weight(4 * width)]
    width = 8200 if is_wide else 12
    shape = (1, 1, 1, 2, width)
    return residual_norm, [make(*shape), make(*shape), make_weight(width), make_weight(width)]


def attend(qkv, table, pad, **options):
    return window_attention(qkv, table, pad_qkv=pad, **WINDOW, **options)


def results(function, inputs, kernels):
    """What a call gives, and the gradients that can be asked for."""
    leaves = [each.detach().requires_grad_(each.requires_grad) for each in inputs]
    outputs = function(*leaves, kernels=kernels)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    ups = [torch.linspace(-1, 1, each.numel()).view(each.shape).to(each) for each in outputs]
    leaves = [each for each in leaves if each.requires_grad]
    return (*outputs, *(torch.autograd.grad(outputs, leaves, ups) if leaves else ()))


def assert_refused(cell, function, inputs):
    """The call is refused with the reason of the cell, up to what was got."""
    with pytest.raises((TypeError, selection.UnavailableError)) as caught:
        function(*inputs, kernels=cell.kernels)
    said, reason = str(caught.value), cell.reason.partition(", got")[0]
    if isinstance(caught.value, TypeError):
        assert said.startswith(f"{cell.case.operator}: {reason}")
    else:
        begins = f"{cell.case.operator}: kernels={cell.kernels!r} cannot run: {reason}"
        assert said.startswith(begins), said
        assert said.endswith(f"; {selection.CURE}")


@KERNELS
def test_every_cell_is_what_a_call_on_meta_tensors_gets(kernels):
    proofs = set()
    for cell in support.cells(kernels):
        function, inputs = call_of(cell.case, cell.dtype)
        inputs = [each.to("meta") for each in inputs]
        if cell.proof is None:
            assert_refused(cell, function, inputs)
        else:
            results(function, inputs, kernels)
        proofs.add(cell.proof)
    assert None in proofs
    assert support.PROOFS[kernels] in proofs


@pytest.mark.parametrize("operator", suite.OPERATORS)
@KERNELS
def test_every_cell_is_what_a_call_gets_here(kernels, operator, one_thread):
    """What is proven on a processor runs and is right; the rest is refused."""
    if suite.reason_against(operator, kernels) is not None:
        pytest.skip(suite.reason_against(operator, kernels))
    for cell in support.cells(kernels):
        if cell.case.operator != operator:
            continue
        function, inputs = call_of(cell.case, cell.dtype)
        if cell.proof is None:
            assert_refused(cell, function, inputs)
        elif cell.proof != support.PROOFS[kernels]:
            assert (kernels, cell.dtype) == ("triton", torch.bfloat16)
            with pytest.raises(selection.UnavailableError, match=selection.WRONG_IF_INTERPRETED):
                function(*inputs, kernels=kernels)
        else:
            check(results(function, inputs, kernels), function, inputs)


def check(got, function, inputs):
    """Integers are those of the reference, and numbers its own in float64, but for rounding."""
    if not inputs[0].is_floating_point():
        assert all(map(torch.equal, got, results(function, inputs, "reference")))
        return
    exact = results(function, [each.double() for each in inputs], "reference")
    for ours, theirs in zip(got, exact, strict=True):
        assert torch.isfinite(ours).all()
        assert ours.dtype == inputs[0].dtype
        error, most = (ours.double() - theirs).abs().max(), theirs.abs().max()
        assert error <= 16 * torch.finfo(ours.dtype).eps * most
