"""CUDA C++ kernels on a GPU: graphs, streams, devices, more than 2^31 elements, the hardware."""

import operator_suite as suite
import pytest
import torch

from videoswin_kernels import (
    cyclic_shift,
    extension,
    patch_merging,
    residual_norm,
    window_attention,
    window_partition,
    window_reverse,
)

WINDOW = {"window": (2, 3, 3), "shift": (1, 1, 1)}
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        extension.why_not("_ops") is not None, reason=str(extension.why_not("_ops"))
    ),
]


def step(x, affine, kernels="cuda"):
    """All operators, forward and backward: what comes out, and the gradients."""
    x = x.detach().requires_grad_()
    affine = [each.detach().requires_grad_() for each in affine]
    shifted = cyclic_shift(x, (1, 1, 2), kernels=kernels)
    windows = window_partition(shifted, **WINDOW, kernels=kernels)
    back = window_reverse(windows, grid=x.shape[1:4], **WINDOW, kernels=kernels)
    *norms, table = affine
    heads = table.shape[1]
    # Of whole heads, what there is beside them left out.
    q = back[..., : 32 * heads]
    qkv = torch.cat([q, q.sin(), q.cos()], -1)
    attended = window_attention(qkv, table, **WINDOW, num_heads=heads, kernels=kernels)
    branch = torch.cat([attended, back[..., 32 * heads :]], -1)
    total, norm = residual_norm(x, branch, *norms[:2], kernels=kernels)
    merged = patch_merging(total + norm, *norms[2:], kernels=kernels)
    up = torch.linspace(-1, 1, merged.numel(), device=x.device, dtype=merged.dtype)
    return (merged.detach(), *torch.autograd.grad(merged, [x, *affine], up.view_as(merged)))


def make(device="cuda", channels=96):
    """A stream of tokens, the weights of both norms, and a bias table of heads of 32 channels."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7, channels, device=device)
    affine = [torch.randn(n * channels, device=device) for n in (1, 1, 4, 4)]
    return x, [*affine, torch.randn(75, channels // 32, device=device)]


def test_a_captured_step_is_replayed_on_new_values():
    x, affine = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x, affine)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(x, affine)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(map(torch.equal, results, step(x, affine)))


def test_kernels_are_queued_in_the_current_stream():
    x, affine = make()
    expected = step(x.sin(), affine)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # What another stream would read now are the values from before.
        late = torch.zeros_like(x)
        torch.cuda._sleep(100_000_000)
        late.copy_(x.sin())
        results = step(late, affine)
    side.synchronize()
    assert all(map(torch.equal, results, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_kernels_run_on_the_device_of_their_tensors():
    expected = step(*make())
    with torch.cuda.device(0):
        results = step(*make("cuda:1"))
    assert all(result.device.index == 1 for result in results)
    assert all(map(torch.equal, (result.to("cuda:0") for result in results), expected))


def test_tensors_of_more_than_2_31_elements():
    clips, width = 3, 64
    grid = (1, 1 << 13, (2**31 // width >> 13) // 2 + 1)
    x = torch.randn(clips, *grid, width, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    weight, bias = torch.randn(2, width, device="cuda")
    leaf = x.detach().requires_grad_()
    total, norm = residual_norm(leaf, x.flip(0), weight, bias, kernels="cuda")
    (grad,) = torch.autograd.grad((total, norm), leaf, (x, x))
    last = x[-1:].detach().requires_grad_()
    (wanted,) = torch.autograd.grad(
        residual_norm(last, x[:1], weight, bias, kernels="reference"), last, (x[-1:], x[-1:])
    )
    torch.testing.assert_close(grad[-1:], wanted, rtol=2e-3, atol=2e-3)
    rolled = cyclic_shift(x, (0, 3, -2), kernels="cuda")
    assert torch.equal(rolled[-1], x[-1].roll((3, -2), (1, 2)))
    expected = residual_norm(x[-1:], x[:1], weight, bias, kernels="reference")
    for got, wanted in zip((total, norm), expected, strict=True):
        torch.testing.assert_close(got[-1:], wanted, rtol=2e-3, atol=2e-3)
    del total, norm, rolled
    affine = [torch.randn(4 * width, device="cuda") for _ in range(2)]
    up = torch.randn(clips, *grid[:1], grid[1] // 2, -(-grid[2] // 2), 4 * width, device="cuda")
    up, x = up.half(), x.requires_grad_()
    merged = patch_merging(x, *affine, kernels="cuda")
    (grad,) = torch.autograd.grad(merged, x, up)
    last = x.detach()[-1:].requires_grad_()
    expected = patch_merging(last, *affine, kernels="reference")
    torch.testing.assert_close(merged[-1:], expected, rtol=2e-3, atol=2e-3)
    (wanted,) = torch.autograd.grad(expected, last, up[-1:])
    torch.testing.assert_close(grad[-1:], wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_hardware_gives_what_the_emulation_gives(dtype):
    """As near to float64 as it: sums have the same order, but other products are fused."""
    if extension.why_not("_emulated") is not None:
        pytest.skip(extension.why_not("_emulated"))
    x, affine = make("cpu", 40)
    x, affine = x.to(dtype), [each.to(dtype) for each in affine]
    emulated = step(x, affine)
    native = step(x.cuda(), [each.cuda() for each in affine])
    exact = step(x.double(), [each.double() for each in affine], "reference")
    for one, other, judge in zip(emulated, native, exact, strict=True):
        suite.assert_budget(other.cpu(), judge, one, dtype)
