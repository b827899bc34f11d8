"""Compiles what a launch would run, for GPUs that are not there: `triton_compile.py 90`.

The launchers run on CPU tensors; where they would start a kernel, it is compiled instead, with the
specialisations that Triton would make of the arguments. Prints a JSON line for each: registers,
bytes of stack, shared memory, tensor-core instructions, a sum of Triton's own code, in which
bfloat16 is written as float16. Not in one process with the interpreter.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))

from videoswin_kernels import testing
from videoswin_kernels.ops._declare import NAMESPACES
from videoswin_kernels.triton import _compiler, attention, attention_backward

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
HALVES = (torch.float16, torch.bfloat16)


class Recorder:
    """Stands where the launch of a kernel stands, and compiles it, each specialisation once."""

    def __init__(self, architecture):
        self.target, self.seen, self.label = GPUTarget("cuda", architecture, 32), set(), ""

    def __call__(self, kernel, *arguments, **options):
        names = {p.name for p in kernel.params}
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        values |= {name: options.pop(name) for name in list(options) if name in names}
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            kind, is_divisible = self.specialise(parameter, value)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[parameter.name] = value
            elif is_divisible:
                attributes[(place,)] = [["tt.divisibility", 16]]
        key = repr((kernel.__name__, signature, constants, attributes, options))
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=self.target, options=options)
        print(json.dumps(self.row(kernel, compiled, constants)), flush=True)

    @staticmethod
    def specialise(parameter, value):
        """(type of an argument, whether 16 divides it)."""
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            return "constexpr", False
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype], value.data_ptr() % 16 == 0
        if type(value) is int:
            kind = "i32" if value < 2**31 else "i64"
            return kind, value % 16 == 0 and not parameter.do_not_specialize
        return "fp32", False

    def row(self, kernel, compiled, constants):
        """What the machine code needs, and a sum of Triton's code, the same for both halves."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage, code = (
                subprocess.run(
                    [tool, option, file.name], capture_output=True, text=True, check=True
                ).stdout
                for option in ("-res-usage", "-sass")
            )
        # Without paths: what is found in Triton's cache may have been compiled in another folder.
        ttir = re.sub(r'"[^"]*/([^"/]*)"', r'"\1"', compiled.asm["ttir"].replace("bf16", "f16"))
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        return {
            "kernel": kernel.__name__,
            "case": self.label,
            "architecture": self.target.arch,
            "registers": int(registers),
            "stack": int(stack),
            "shared": compiled.metadata.shared,
            # Half types that are neither the other's nor its own would stay hidden in the sum.
            "halves": sorted(set(re.findall(r"b?f16", compiled.asm["ttir"]))),
            "ttir": hashlib.sha256(ttir.encode()).hexdigest(),
            "tensor_cores": [name for name in TENSOR_CORES if re.search(rf"\b{name}\b", code)],
            "constants": {name: repr(value) for name, value in constants.items()},
        }


# Windows of a model, with and without a mask and padding; then windows that tiles are cut for.
MODEL = [
    testing.Case(grid, (8, 7, 7), shift)
    for grid in ((9, 13, 14), (8, 14, 14))
    for shift in ((4, 3, 3), (0, 0, 0))
]
SMALL = [
    testing.Case((5, 4, 7), (2, 3, 3), (1, 1, 1)),
    testing.Case((4, 6, 6), (2, 3, 3), (0, 0, 0)),
    testing.Case((3, 5, 3), (2, 2, 2), (1, 1, 1)),
    testing.Case((4, 4, 4), (2, 2, 2), (0, 0, 0)),
]


def launches_of_a_model(recorder):
    """What half precision launches where heads have 32 channels, in both its types."""
    for dtype in HALVES:
        for case in (MODEL[0], *MODEL[2:], SMALL[0]):
            recorder.label = f"{dtype} window {case.window} width 32"
            attend(case, 32, dtype, torch.float32)
        others(recorder, dtype, 96)


def launches(recorder):
    """Calls every operator so that each kernel is launched in all the ways that it can be.

    bfloat16 is left to a model's heads: its code is that of float16. Heads are 3, of which 16
    divides no size, or 16; the sets of gradients that can be asked for are asked of one width.
    """
    launches_of_a_model(recorder)
    for dtype in (torch.float16, torch.float32):
        for width in testing.HEAD_WIDTHS:
            for case in (*MODEL, *SMALL):
                recorder.label = f"{dtype} window {case.window} width {width}"
                is_all = width == 32 and case in (MODEL[0], MODEL[3])
                attend(case, width, dtype, torch.float32, is_all=is_all)
        recorder.label = f"{dtype} window (8, 7, 7) 16 heads"
        attend(MODEL[0], 32, dtype, dtype, heads=16)
        for width in (7, 768):
            others(recorder, dtype, width)
    for dtype in (torch.int8, torch.float16, torch.float32, torch.float64):
        recorder.label = f"movement of {dtype}"
        x = torch.empty(2, 3, 5, 6, 96).to(dtype)
        OPERATORS.cyclic_shift(x, [1, 2, 3])
        windows = OPERATORS.window_partition(x, [2, 3, 3], [1, 1, 1])
        OPERATORS.window_reverse(windows, [3, 5, 6], [2, 3, 3], [1, 1, 1])


def launches_in_tf32(recorder):
    """float32 attention as it is where torch allows TF32."""
    for width in testing.HEAD_WIDTHS:
        for case in (MODEL[0], SMALL[0]):
            recorder.label = f"tf32 window {case.window} width {width}"
            attend(case, width, torch.float32, torch.float32)


def others(recorder, dtype, width):
    """The operators that are not attention."""
    recorder.label = f"{dtype} channels {width}"
    x = torch.empty(2, 2, 5, 6, width, dtype=dtype)
    merge(x, torch.empty(4 * width))
    add_and_normalise(x, torch.empty(width))


def attend(case, width, dtype, table_dtype, *, heads=3, is_all=False):
    """Attention with values for what is padded, and all gradients or each set that it can give."""
    qkv = torch.empty(1, *case.grid, 3 * heads * width, dtype=dtype)
    depth, height, across = case.window
    rows = (2 * depth - 1) * (2 * height - 1) * (2 * across - 1)
    table = torch.empty(rows, heads, dtype=table_dtype)
    pad = torch.empty(3 * heads * width, dtype=dtype)
    options = (case.window, case.shift, heads, 0.2)
    out, log_sum_exp = OPERATORS.window_attention(qkv, table, pad, *options)
    saved = (out, log_sum_exp, *options)
    sets = product((True, False), repeat=3) if is_all else [(True, True, True)]
    for needs in sets:
        OPERATORS.window_attention_backward(out, qkv, table, pad, *saved, *needs)
    if is_all:
        # Without values, what is padded is zeros.
        OPERATORS.window_attention(qkv, table, None, *options)
        OPERATORS.window_attention_backward(out, qkv, table, None, *saved, True, True, False)


def merge(x, weight):
    """Patch merging, with each set of gradients that a training step can ask for."""
    out, mean, rstd = OPERATORS.patch_merging(x, weight, weight, 1e-5, x.dtype)
    for needs in ((True, True), (True, False), (False, True)):
        OPERATORS.patch_merging_backward(out, x, weight, mean, rstd, *needs)


def add_and_normalise(x, weight):
    """Residual and norm, with each set of gradients that a training step can ask for."""
    for scale in (None, torch.empty(len(x))):
        total, norm, mean, rstd = OPERATORS.residual_norm(
            x, x, weight, weight, scale, 1e-5, x.dtype
        )
        for ups in ((total, norm), (total, None), (None, norm)):
            saved = (total, weight, mean, rstd, scale, x.dtype)
            OPERATORS.residual_norm_backward(*ups, *saved, True, scale is not None, True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("architectures", nargs="+", type=int)
    parser.add_argument("--quick", action="store_true", help="no float32, and common widths alone")
    arguments = parser.parse_args()
    OPERATORS = NAMESPACES["triton"]
    # Lets CPU tensors pass; what would be launched on them is compiled instead.
    _compiler.check_tensors = lambda kernel, tensors: None
    for number in arguments.architectures:
        recorder = Recorder(number)
        for module in (attention, attention_backward):
            module.architecture = lambda x, number=number: number
        JITFunction.__getitem__ = lambda kernel, grid, record=recorder: partial(record, kernel)
        if arguments.quick:
            launches_of_a_model(recorder)
            continue
        launches(recorder)
        for module in (attention, attention_backward):
            module.dot_precision = lambda: "tf32"
        launches_in_tf32(recorder)
        for module in (attention, attention_backward):
            module.dot_precision = _compiler.dot_precision
