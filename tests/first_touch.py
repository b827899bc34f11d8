"""One row of the first-touch matrix: what a fresh process does first with a kernel set.

    python tests/first_touch.py ROW --kernels triton --device cpu [--files DIR]

Imports torch, and forks for every subject before anything of ours is loaded, so that each starts
as cold as a process of its own. Prints a JSON object of {subject: "" or the traceback}.
"""

import argparse
import copy
import json
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo
import torch._dynamo.testing
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

WINDOW = {"window": (2, 3, 3), "shift": (1, 1, 1)}
# No two sizes are equal: a traced program takes equal sizes for one. The last grids are odd where
# the first are even; under attention alone one of them is smaller than the window.
SHAPES = [(2, 5, 4, 7), (3, 4, 6, 9), (6, 3, 5, 8)]
CONSTRUCTORS = "arange full tensor scalar_tensor lift_fresh zeros ones empty eye linspace rand"


class Movement(nn.Module):
    """The three operators that only move, with arithmetic between them."""

    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        import videoswin_kernels as ours

        x = ours.cyclic_shift(x * self.weight, (1, -2, 3), kernels=self.kernels)
        windows = ours.window_partition(x, **WINDOW, kernels=self.kernels)
        grid = x.shape[1:4]
        return ours.window_reverse(windows.sin(), grid=grid, **WINDOW, kernels=self.kernels)


class Attention(nn.Module):
    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels
        self.qkv = nn.Linear(6, 48)
        self.table = nn.Parameter(torch.randn(75, 1))

    def forward(self, x):
        from videoswin_kernels import window_attention

        options = {**WINDOW, "num_heads": 1, "pad_qkv": self.qkv.bias, "kernels": self.kernels}
        return window_attention(self.qkv(x), self.table, **options)


class Merging(nn.Module):
    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels
        self.weight, self.bias = (nn.Parameter(torch.randn(24)) for _ in range(2))

    def forward(self, x):
        from videoswin_kernels import patch_merging

        return patch_merging(x, self.weight, self.bias, kernels=self.kernels)


class Norm(nn.Module):
    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels
        self.linear = nn.Linear(6, 6)
        self.weight, self.bias = (nn.Parameter(torch.randn(6)) for _ in range(2))

    def forward(self, x):
        from videoswin_kernels import residual_norm

        scale = x.detach()[:, 0, 0, 0, 0].sign()
        total, norm = residual_norm(
            x, self.linear(x), self.weight, self.bias, branch_scale=scale, kernels=self.kernels
        )
        return total.sin() * norm


class Stage(nn.Sequential):
    """A training step through every operator but attention."""

    def __init__(self, kernels):
        super().__init__(Norm(kernels), Movement(kernels), Merging(kernels))


def model(kernels):
    from model import SwinTransformer3D

    window = WINDOW["window"]
    options = dict(patch_size=(2, 4, 4), window_size=window, embed_dim=16, patch_norm=True)
    net = SwinTransformer3D(**options, depths=(2, 1), num_heads=(1, 2), kernels=kernels)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.eval()


SUBJECTS = {
    "movement": Movement,
    "window_attention": Attention,
    "patch_merging": Merging,
    "residual_norm": Norm,
    "stage": Stage,
    "model": model,
}


class Bench:
    """A subject under a kernel set, its inputs, and how its results are judged."""

    def __init__(self, subject, options):
        self.subject, self.options = subject, options

    def build(self, kernels=None):
        """The module; the same parameters whatever the kernel set."""
        torch.manual_seed(0)
        return SUBJECTS[self.subject](kernels or self.options.kernels)

    def module(self):
        return self.build().to(self.options.device)

    def x(self, number=0):
        """Clips or tokens of one of the shapes."""
        batch, *grid = SHAPES[number]
        if self.subject == "window_attention" and number == 2:
            grid[1] = 2
        shape = (batch, *grid, 6)
        if self.subject == "model":
            shape = (batch, 3, 2 * grid[0], 4 * grid[1], 4 * grid[2])
        generator = torch.Generator().manual_seed(number)
        return torch.randn(shape, generator=generator).to(self.options.device)

    def step(self, call, module, number=0):
        """[output, gradients of the input and of every parameter]."""
        x = self.x(number).requires_grad_()
        out = call(x)
        loss = (out * out.detach().cos()).sum()
        return [out, *torch.autograd.grad(loss, [x, *module.parameters()])]

    def check(self, call, module, number=0):
        """The results of a call are plain tensors and those of the reference."""
        got = self.step(call, module, number)
        twin = self.build("reference").to(self.options.device)
        self.compare(got, self.step(twin, twin, number))

    def compare(self, got, expected):
        for value, other in zip(got, expected, strict=True):
            # Not a FakeTensor, which a cache filled under tracing would give.
            assert type(value) is torch.Tensor, type(value)
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)

    def check_output(self, out, number=0):
        with torch.no_grad():
            twin = self.build("reference").to(self.options.device)
            self.compare([out.detach()], [twin(self.x(number))])


def is_index(value):
    """Whether a value of a traced program is a tensor of integers."""
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)


def check_graph(graph):
    """No tensor is made in the graph or comes into it but parameters and inputs."""
    names = set(CONSTRUCTORS.split())
    for part in graph.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for node in part.graph.nodes:
            value = node.meta.get("val", node.meta.get("example_value"))
            where = f"{node.op} {node.name} {node.target}"
            if node.op == "placeholder":
                assert not is_index(value), f"{where}: a tensor of integers comes in"
            elif node.op == "get_attr":
                target = part
                for name in node.target.split("."):
                    target = getattr(target, name)
                is_ours = isinstance(target, (nn.Parameter, torch.fx.GraphModule))
                assert is_ours, f"{where}: a constant"
            elif node.op == "call_function":
                name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
                name = name.removeprefix("new_").removesuffix("_like").removesuffix("_copy")
                assert name not in names, f"{where}: a tensor is made"
            elif node.op == "output":
                for result in node.all_input_nodes:
                    value = result.meta.get("val", result.meta.get("example_value"))
                    assert not is_index(value), f"{where}: a tensor of integers is saved"


class Capture:
    """A backend of torch.compile that keeps dynamo's and AOT's graphs, and checks them."""

    def __init__(self):
        self.seen = []
        self.backend = aot_autograd(
            fw_compiler=self.keep("forward"), bw_compiler=self.keep("backward")
        )

    def keep(self, kind):
        def compiler(graph, example_inputs):
            assert not any(is_index(value) for value in example_inputs), kind
            check_graph(graph)
            self.seen.append(kind)
            return make_boxed_func(graph.forward)

        return compiler

    def __call__(self, graph, example_inputs):
        check_graph(graph)
        self.seen.append("dynamo")
        return self.backend(graph, example_inputs)

    def check(self):
        """One graph each: dynamo may start over within a compilation, AOT compiles but once."""
        assert self.seen[0] == "dynamo"
        others = [kind for kind in self.seen if kind != "dynamo"]
        assert others == ["forward", "backward"], self.seen


def eager(bench):
    module = bench.module()

    def pack(value):
        assert not is_index(value), "a tensor of integers is saved for backward"
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        results = bench.step(module, module)
    twin = bench.build("reference").to(bench.options.device)
    bench.compare(results, bench.step(twin, twin))
    assert not list(module.buffers())


def compiled(bench):
    module, capture = bench.module(), Capture()
    bench.check(torch.compile(module, fullgraph=True, backend=capture), module)
    capture.check()
    bench.check(module, module)


def dynamic(bench):
    module, capture = bench.module(), Capture()
    call = torch.compile(module, fullgraph=True, dynamic=True, backend=capture)
    for number in range(3):
        bench.check(call, module, number)
    capture.check()


def inductor(bench):
    module = bench.module()
    bench.check(torch.compile(module, fullgraph=True), module)


def export(bench, strict=False):
    module = bench.module()
    dims = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(module, (bench.x(),), dynamic_shapes=(dims,), strict=strict)
    check_graph(program.graph_module)
    signature = program.graph_signature
    made = [*signature.buffers, *signature.lifted_tensor_constants, *program.constants]
    assert not made, f"the program has constants: {made}"
    # The eager call comes after tracing: what tracing left behind would show.
    bench.check(module, module)
    bench.check_output(program.module()(bench.x()))
    batch = torch.cat([bench.x()] * 2)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(batch), module(batch))
    if bench.options.files:
        path = Path(bench.options.files) / bench.subject
        torch.export.save(program, path.with_suffix(".pt2"))
        twin = bench.build("reference").to(bench.options.device)
        torch.save((bench.x(), twin(bench.x()).detach()), path.with_suffix(".pt"))


def export_strict(bench):
    export(bench, strict=True)


def fake(bench):
    real, mode = bench.module(), FakeTensorMode()
    parameters = {name: mode.from_tensor(value) for name, value in real.named_parameters()}
    with mode:
        out = torch.func.functional_call(real, parameters, mode.from_tensor(bench.x()))
    assert type(out) is not torch.Tensor
    bench.check(real, real)
    assert out.shape == real(bench.x()).shape
    assert out.device.type == bench.options.device


def inference(bench):
    module = bench.module()
    with torch.inference_mode():
        out = module(bench.x())
    bench.check(module, module)
    bench.check_output(out.clone())


def copies(bench):
    module = bench.module()
    keys = list(module.state_dict())
    bench.check(module, module)
    twins = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for twin in twins:
        assert list(twin.state_dict()) == keys
        assert not list(twin.buffers())
        bench.check(twin, twin)
    # Nothing was hung on the module by running it.
    assert set(vars(bench.module())) == set(vars(module))


def meta(bench):
    shape = bench.x().shape
    with torch.device("meta"):
        module = bench.build()
        out = module(torch.empty(shape))
    assert out.is_meta
    real = bench.module()
    bench.check(real, real)
    assert out.shape == real(bench.x()).shape


def reduce_overhead(bench):
    """CUDA only: CUDA graphs whose memory pools exist before the first eager call."""
    module = bench.module()
    call = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        bench.check(call, module)


def capture(bench):
    """CUDA only: a cold capture is refused in one sentence; after a first call it works."""
    module, x = bench.module(), bench.x()
    # cuBLAS and the allocator are warm; the geometry is not.
    twin = bench.build("reference").cuda()
    with torch.no_grad():
        expected = twin(x)
        graph = torch.cuda.CUDAGraph()
        said = ""
        try:
            with torch.cuda.graph(graph):
                module(x)
        except RuntimeError as error:
            said = str(error)
        assert "is not on cuda:0 yet; run once before capturing" in said, said
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


ROWS: dict[str, Callable[[Bench], None]] = {
    function.__name__: function
    for function in (
        eager,
        compiled,
        dynamic,
        inductor,
        export,
        export_strict,
        fake,
        inference,
        copies,
        meta,
        reduce_overhead,
        capture,
    )
}


CUDA_ROWS = ("reduce_overhead", "capture")


def subjects(row):
    """What a row is asked for; Inductor's C++ compiler takes ten seconds for each."""
    return ["window_attention", "stage"] if row == "inductor" else list(SUBJECTS)


def child(row, bench, pipe):
    """Runs a row in a forked process and sends its traceback, or nothing."""
    said = ""
    try:
        torch.set_num_threads(1)
        ROWS[row](bench)
    except BaseException:
        said = traceback.format_exc()
    with os.fdopen(pipe, "w") as file:
        file.write(said or " ")
    os._exit(0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--kernels", default="triton")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--files")
    options = parser.parse_args()
    said = {}
    for subject in subjects(options.row):
        # What would make a subject warm is loaded in no process before the fork.
        assert not {"videoswin_kernels", "model"} & set(sys.modules)
        read, write = os.pipe()
        if os.fork() == 0:
            child(options.row, Bench(subject, options), write)
        os.close(write)
        with os.fdopen(read) as file:
            text = file.read()
        _, status = os.wait()
        said[subject] = text.strip() if text else f"died with status {status}"
    print(json.dumps(said))


if __name__ == "__main__":
    main()
