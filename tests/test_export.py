"""What leaves Python: whole models by torch.compile, torch.export, AOTInductor and ONNX.

Single operators are asked in test_first_touch.py, what is refused in test_export_page.py.
"""

from collections import Counter

import operator_suite as suite
import pytest
import torch
import torch._dynamo.testing
from model_suite import randomize
from torchvision.models.video.swin_transformer import SwinTransformer3d

import videoswin_kernels
from model import create
from videoswin_kernels import accelerate, extension
from videoswin_kernels.selection import Call, UnavailableError, choose

HAS_CPU = extension.why_not("_ops_cpu") is None
NEEDS_CPU = pytest.mark.skipif(not HAS_CPU, reason="no kernels for processors here")
# How often the models below, of three blocks, call each operator.
NODES = {
    "videoswin_cpu.window_attention.default": 3,
    "videoswin_cpu.residual_norm.default": 3,
    "videoswin_cpu.patch_merging.default": 1,
}
# Tokens [2, 4, 5], padded to windows, clamped in depth, shifted; an odd width.
SIZE = (3, 4, 16, 19)
pytestmark = pytest.mark.usefixtures("one_thread")


def ours(word):
    depths, window = (2, 1), (4, 3, 3)
    model = create("swin_nano", num_classes=5, depths=depths, window_size=window, kernels=word)
    return randomize(model).eval()


def theirs(word):
    sizes = {"patch_size": [2, 4, 4], "window_size": [4, 3, 3], "num_classes": 5}
    model = SwinTransformer3d(**sizes, embed_dim=32, depths=[2, 1], num_heads=[1, 2])
    return accelerate(randomize(model).eval(), word)


def each_model(marks_of_theirs):
    """Rows (make, word): the reference is traced in seconds; of theirs it is torchvision's own."""
    rows = [pytest.param(ours, "cpu", marks=NEEDS_CPU)]
    rows += [pytest.param(ours, "reference", marks=pytest.mark.slow)]
    rows += [pytest.param(theirs, "cpu", marks=[NEEDS_CPU, *marks_of_theirs])]
    return pytest.mark.parametrize(("make", "word"), rows)


def clips(batch):
    return torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(batch))


def check_compiled(model, dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    for batch in (2, 3, 5):
        x = clips(batch)
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@each_model([pytest.mark.slow])
def test_one_graph_for_all_numbers_of_clips(make, word):
    check_compiled(make(word), None)


@pytest.mark.slow
@each_model([])
def test_one_graph_with_symbols_for_all_sizes(make, word):
    check_compiled(make(word), True)


def exported(model):
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (clips(2),), dynamic_shapes=({0: batch},))


@each_model([])
def test_an_exported_model_has_our_operators_and_any_number_of_clips(make, word):
    model = make(word)
    program = exported(model)
    names = [str(node.target) for node in program.graph.nodes]
    assert Counter(name for name in names if "videoswin" in name) == (
        NODES if word == "cpu" else {}
    )
    for batch in (1, 2, 5):
        with torch.no_grad():
            got = program.module()(clips(batch))
            torch.testing.assert_close(got, model(clips(batch)), rtol=0, atol=0)


def to_onnx(model, *inputs):
    return torch.onnx.export(model, inputs, dynamo=True, verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["auto", "reference"])
def test_onnx_computes_what_the_model_does(word):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = ours(word), clips(2)
    program = to_onnx(model, x)
    domains = {node.domain for node in program.model_proto.graph.node}
    assert domains <= {"", "pkg.onnxscript.torch_lib"}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    got = torch.from_numpy(session.run(None, {"clips": x.numpy()})[0])
    with torch.no_grad():
        naive = ours("reference")(x)
        exact = ours("reference").double()(x.double())
        suite.assert_budget(got, exact, naive)
        # Nothing of the export stays: eager calls have their kernels again.
        chosen = {choice.kernels for choice in videoswin_kernels.explain(model)}
        assert chosen == ({"cpu"} if HAS_CPU and word == "auto" else {"reference"})
        assert torch.equal(model(x), ours(chosen.pop())(x))


@pytest.mark.parametrize("operator", suite.OPERATORS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_for_onnx_auto_is_the_reference_on_every_device(operator, device):
    call = Call(operator, device, is_for_onnx=True)
    assert choose(call, "auto").kernels == "reference"
    for word in ("fused", *suite.NAMED):
        with pytest.raises(UnavailableError, match=r"ONNX has no operators.*kernels='reference'"):
            choose(call, word)


@pytest.mark.parametrize("operator", suite.OPERATORS)
@pytest.mark.parametrize("word", ["auto", "reference"])
def test_every_operator_refuses_to_be_traced(operator, word):
    """Whatever the word: the reference asks for sizes in Python, which is traced once."""
    x = torch.ones(1)

    def call(x):
        return suite.smallest_call(operator, word)

    with pytest.raises(UnavailableError, match=f"^{operator}: torch.jit.trace would keep"):
        torch.jit.trace(call, (x,))
    call(x)


@pytest.mark.parametrize("operator", suite.OPERATORS)
def test_every_operator_refuses_to_be_scripted(operator):
    function = getattr(videoswin_kernels, operator)
    sentence = f"^{operator}: torch.jit.script cannot compile it; use torch.compile or torch.export"
    with pytest.raises(UnavailableError, match=sentence):
        torch.jit.script(function)

    class User(torch.nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(UnavailableError, match=sentence):
        torch.jit.script(User())
