"""docs/export.md: its code runs, and what it says is refused is refused in its words."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_export import NEEDS_CPU, NODES, clips, ours, theirs, to_onnx

from videoswin_kernels import window_attention

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("one_thread")


def twice(model):
    x = clips(1).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    grad.sum().backward()


def attend(x):
    return window_attention(x, torch.ones(3, 2), window=(1, 1, 2), num_heads=2, kernels="cpu")


def old_onnx(word):
    torch.onnx.export(ours(word), (clips(1),), io.BytesIO(), dynamo=False, verbose=False)


# What the table of the page begins its rows with; each raises the sentence of its row.
REFUSED = {
    '`torch.onnx.export` with `kernels="cpu"`': [lambda: to_onnx(ours("cpu"), clips(1))],
    "`torch.onnx.export(dynamo=False)`": [
        lambda: old_onnx("cpu"),
        lambda: old_onnx("auto"),
        lambda: old_onnx("reference"),
    ],
    "`torch.jit.trace`": [
        lambda: torch.jit.trace(ours("cpu"), (clips(1),)),
        lambda: torch.jit.trace(theirs("cpu"), (clips(1),)),
        lambda: torch.jit.trace(ours("auto"), (clips(1),)),
        lambda: torch.jit.trace(ours("reference"), (clips(1),)),
    ],
    "`torch.jit.script`": [
        lambda: torch.jit.script(window_attention),
        lambda: torch.jit.script(ours("cpu")),
        lambda: torch.jit.script(ours("reference")),
        lambda: torch.jit.script(theirs("cpu")),
    ],
    "`torch.vmap`": [
        lambda: torch.vmap(ours("cpu"))(clips(2)[:, None]),
        lambda: torch.vmap(theirs("cpu"))(clips(2)[:, None]),
        lambda: torch.func.jvp(ours("cpu"), (clips(1),), (clips(1),)),
        lambda: torch.func.jacfwd(attend)(torch.ones(1, 1, 1, 2, 12)),
    ],
    "double backward": [lambda: twice(ours("cpu")), lambda: twice(theirs("cpu"))],
}
ROWS = re.findall(r"^\| (.+?) \| `(.+)` \|$", PAGE, re.MULTILINE)


def sentences(error):
    """Of an error and of what it came from, the last first."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def test_the_page_says_all_that_is_refused():
    assert len(ROWS) == len(REFUSED)
    for (what, _), begins in zip(ROWS, REFUSED, strict=True):
        assert what.startswith(begins)


@NEEDS_CPU
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("what", "place"),
    [(what, place) for what, calls in REFUSED.items() for place in range(len(calls))],
)
def test_a_refusal_is_the_sentence_of_the_page(what, place):
    if "onnx" in what:
        pytest.importorskip("onnxscript")
    (sentence,) = [said for row, said in ROWS if row.startswith(what)]
    with pytest.raises(RuntimeError) as caught:
        REFUSED[what][place]()
    who = r"(window_attention|residual_norm|SwinTransformerBlock(3D)?)"
    pattern = re.compile(f"{who}: {re.escape(sentence)}")
    assert any(map(pattern.fullmatch, sentences(caught.value))), list(sentences(caught.value))


# The page's model, made small; in each of its programs the clips and what it computes are kept.
SMALL = {
    '"swin_t", num_classes=400': '"swin_nano", num_classes=5, depths=(1, 1)',
    "3, 32, 224, 224": "3, 4, 16, 19",
}
KEEP = """
torch.save((clips, logits, net(clips).detach()), "clips.pt")
print(*{str(node.target) for node in program.graph.nodes})
"""
COMPARE = """
import sys
expected = torch.load("clips.pt")[2]
torch.testing.assert_close(torch.as_tensor(logits).detach(), expected, rtol=1e-4, atol=1e-5)
assert "model" not in sys.modules
"""
# Any number of clips; and where a library is missing, the sentence that says so.
MORE = """
torch.testing.assert_close(net(clips.repeat(3, 1, 1, 1, 1))[-2:].detach(), expected)
from videoswin_kernels import extension
missing = extension.Loaded("the C++ library is not built", {})
extension._loaded.update(dict.fromkeys(extension.NAMESPACES, missing))
try:
    net(clips)
except RuntimeError as error:
    print(error)
"""
MISSING = (
    "window_attention: kernels='cpu' cannot run: the C++ library is not built; "
    "use kernels='reference' or kernels='auto'"
)


def programs():
    """(what makes the files, [what loads one of them in a process of its own])."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    loads = [block for block in blocks[1:] if block.startswith("import ")]
    makes = "\n".join(block for block in blocks if block not in loads)
    for old, new in SMALL.items():
        assert makes.count(old) == 1, old
        makes = makes.replace(old, new)
    return makes, loads


def run(program, folder):
    variables = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
@NEEDS_CPU
def test_the_code_of_the_page(tmp_path):
    """Its files are made in one process, and each is loaded in one that imports what it says."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    makes, loads = programs()
    done = run(makes + KEEP, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(done.stdout.split()) >= set(NODES)
    _, compiled, eager = torch.load(tmp_path / "clips.pt")
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert len(loads) == 3
    for load in loads:
        program = 'import torch\nclips = torch.load("clips.pt")[0]\n' + load + COMPARE
        is_ours = "import videoswin_kernels\n" in load
        done = run(program + (MORE if is_ours else ""), tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        if is_ours:
            assert MISSING in done.stdout
            done = run(program.replace("import videoswin_kernels\n", ""), tmp_path)
            assert done.returncode != 0
            assert "videoswin_cpu" in done.stderr
