"""docs/your_own_model.md: its code as it stands there, and what it says of the operators."""

import copy
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import operator_suite as suite
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from videoswin_kernels import explain, window_attention

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/your_own_model.md").read_text(encoding="utf-8")
# One voxel; below the window on some axes, and on all; a volume as of a scanner.
SIZES = ((1, 1, 1), (2, 9, 5), (3, 2, 3), (33, 47, 29))
needs_cpu = pytest.mark.skipif(
    suite.reason_against("window_attention", "cpu") is not None, reason="no kernels for processors"
)


def blocks():
    return re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page():
    """What the code of the page defines, without what it does when it is run."""
    names = {"__name__": "page"}
    for block in blocks():
        exec(compile(block, "docs/your_own_model.md", "exec"), names)
    return SimpleNamespace(**names)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_are_of_every_voxel_and_every_parameter_learns(page, size):
    model = page.UNet(4)
    logits = model.train()(torch.randn(1, 1, *size))
    assert logits.shape == (1, 4, *size)
    assert torch.isfinite(logits).all()
    logits.sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@needs_cpu
@pytest.mark.parametrize("size", [(2, 9, 5), (7, 10, 9)], ids=str)
def test_kernels_for_processors_are_the_reference_in_float64(page, size):
    models = [page.UNet(3, kernels=word).double() for word in ("cpu", "reference")]
    models[1].load_state_dict(models[0].state_dict())
    volumes = suite.random(2, 1, *size)
    outcomes = [page.outcome(model, volumes) for model in models]
    assert len(outcomes[0]) == 1 + len(list(models[0].parameters()))
    torch.testing.assert_close(*outcomes, rtol=1e-9, atol=1e-11)


@needs_cpu
def test_the_check_of_the_page_passes_and_sees_a_wrong_call(page, monkeypatch):
    volumes = suite.random(1, 1, 5, 7, 6)
    page.check(volumes)
    right = page.window_attention

    def wrong(*inputs, kernels, **options):
        if kernels == "fused":
            options["pad_qkv"] = None
        return right(*inputs, kernels=kernels, **options)

    monkeypatch.setitem(page.Attention.forward.__globals__, "window_attention", wrong)
    with pytest.raises(AssertionError):
        page.check(volumes)


def test_a_few_steps_of_training_lower_the_loss_and_raise_dice(page):
    model, test = page.UNet(3), page.balls_and_cubes(4)
    before = page.dice(model, *test)
    losses = [page.train(model, 8) for _ in range(3)]
    assert losses[0] > losses[2]
    assert losses[2] < 0.3
    assert page.dice(model, *test) > before + 0.2


def test_the_task_has_balls_and_cubes_in_noise(page):
    volumes, classes = page.balls_and_cubes(3, size=(13, 12, 15))
    assert volumes.shape == (3, 1, 13, 12, 15)
    assert classes.shape == (3, 13, 12, 15)
    assert ((classes == 2).sum(dim=(1, 2, 3)) <= 125).all()
    assert set(classes.unique().tolist()) == {0, 1, 2}
    assert 0.4 < volumes[:, 0][classes == 0].std() < 0.6
    knows, knows_half = Knows(classes), Knows(classes.where(classes == 1, 0))
    assert page.dice(knows, volumes, classes) == 1
    assert page.dice(knows_half, volumes, classes) == 0.5


class Knows(torch.nn.Module):
    """A model whose logits are those of the classes that it was told."""

    def __init__(self, classes):
        super().__init__()
        self.logits = torch.nn.functional.one_hot(classes, 3).movedim(-1, 1).float()

    def forward(self, volumes):
        return self.logits


@pytest.mark.slow
def test_it_compiles_to_one_graph(page):
    torch._dynamo.reset()
    model = page.UNet(3).eval()
    volumes = torch.randn(2, 1, 7, 10, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager, traced = (page.outcome(each, volumes) for each in (model, compiled))
    torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@needs_cpu
@pytest.mark.slow
def test_the_whole_program_prints_what_the_page_says_it_does():
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks())],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (printed,) = re.findall(r"^```\n(before: .*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    number = r"\d\.\d+"
    assert re.sub(number, "N", done.stdout) == re.sub(number, "N", printed)
    assert float(re.findall(number, done.stdout)[-1]) > 0.5


# What the page says of operators.


@pytest.mark.parametrize("kernels", suite.kernel_sets("window_attention"))
def test_a_fitted_table_is_read_by_relative_position(page, kernels):
    window, shift, grid = (4, 3, 4), (2, 1, 2), (4, 2, 3)
    table, qkv = torch.randn(7 * 5 * 7, 1), torch.randn(1, *grid, 3 * 16)
    places = list(product(*map(range, grid)))
    bias = torch.empty(len(places), len(places))
    for (i, a), (j, b) in product(enumerate(places), repeat=2):
        depth, height, width = (p - q + w - 1 for p, q, w in zip(a, b, window, strict=True))
        bias[i, j] = table[(depth * 5 + height) * 7 + width]
    q, k, v = qkv.view(len(places), 3, 16).unbind(1)
    exact = ((q @ k.T / 4 + bias).softmax(-1) @ v).view(1, *grid, 16)

    def attend(table, window, shift):
        options = {"num_heads": 1, "kernels": kernels}
        return window_attention(qkv, table, window=window, shift=shift, **options)

    torch.testing.assert_close(attend(*page.fitted(table, window, shift, grid)), exact)
    # As upstream, it is read otherwise where height or width are clamped.
    assert not torch.allclose(attend(table, window, shift), exact, atol=1e-2)
    # And as it stands where the depth alone is, or nothing.
    for grid in ((2, 3, 4), (5, 7, 6)):
        qkv = torch.randn(1, *grid, 3 * 16)
        parts = page.fitted(table, window, shift, grid)
        if min(grid) > 4:
            assert parts[1:] == (window, shift)
        torch.testing.assert_close(attend(*parts), attend(table, window, shift))


def test_a_pad_is_what_the_linear_makes_of_zeros(page):
    attention, x = page.Attention(16, (2, 2, 2), (0, 0, 0)).eval(), torch.randn(1, 4, 4, 3, 16)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    torch.testing.assert_close(attention(x), attention(padded)[:, :, :, :3])


def test_explain_says_what_it_would_run(page):
    chosen = explain(page.UNet(3, kernels="reference"))
    assert {each.operator for each in chosen} == {
        "window_attention",
        "residual_norm",
        "patch_merging",
    }
    assert {each.kernels for each in chosen} == {"reference"}


def test_under_autocast_the_stream_has_the_dtype_it_is_given(page):
    add, x = page.Add(16), torch.randn(1, 2, 3, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert [each.dtype for each in add(x, x)] == [torch.float32, torch.bfloat16]
        model = page.UNet(3)
        assert model.downs[0][0](x).dtype == torch.bfloat16
        assert model(torch.randn(1, 1, 5, 6, 7)).isfinite().all()


def test_stochastic_depth_drops_branches_of_whole_volumes_in_training_alone(page):
    add, x = page.Add(16), torch.zeros(64, 1, 1, 2, 16)
    add.drop_path = 0.25
    branch = torch.ones_like(x).requires_grad_()
    total, _ = add.train()(x, branch)
    assert set(total.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(total.amin((1, 2, 3, 4)), total.amax((1, 2, 3, 4)))
    assert torch.equal(add.eval()(x, branch)[0], branch)


def test_a_stage_can_be_checkpointed(page):
    stage, x = page.Stage(16, (2, 2, 2)), torch.randn(1, 3, 5, 4, 16)
    again = copy.deepcopy(stage)
    stage(x).sin().sum().backward()
    checkpoint(again, x, use_reentrant=False).sin().sum().backward()
    pairs = zip(stage.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


def test_the_memory_of_scores_is_as_the_page_says():
    tokens = 49**3
    assert f"{tokens * 7**3 * 3 * 4 / 1e6:.0f} MB" in PAGE
