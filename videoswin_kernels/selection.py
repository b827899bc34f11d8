"""Which kernel set runs an operator: one word, resolved by a pure function, never silently.

    "auto"       the first entry of `TABLE` that can run on the device; `reference` is its last
    "fused"      the same without `reference`; refuses, with all reasons, where nothing else can
    "reference"  plain PyTorch: any device, any floating-point dtype, differentiable by autograd
    "triton", "cuda", "cpu"  exactly this kernel set, or a refusal

Nothing here logs or warns; `explain` says what would run. A kernel set is imported, and asked
whether it can run, by the first call that could choose it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, NoReturn, overload

import torch
from torch import Tensor, nn

from videoswin_kernels import extension

MOVEMENT = ("cyclic_shift", "window_partition", "window_reverse")
OPERATORS = (*MOVEMENT, "window_attention", "patch_merging", "residual_norm")
WORDS = ("auto", "fused", "reference", "triton", "cuda", "cpu")


class UnavailableError(RuntimeError):
    """The kernels asked for cannot run here: one sentence with the reason and the cure."""


class Entry(NamedTuple):
    """A place in the order of preference, and the bench row that earned it (None: unmeasured)."""

    kernels: str
    row: str | None = None


class Choice(NamedTuple):
    """What would run `operator`: the kernel set, why it, and the bench row behind the choice."""

    operator: str
    kernels: str
    reason: str
    row: str | None


# Order of preference for each device type and operator; `reference` is always the last.
_CUDA = (Entry("triton"), Entry("cuda"), Entry("reference"))
_CUDA_ATTENTION = (Entry("cuda"), Entry("triton"), Entry("reference"))
_CPU_ROW = "bench/results/epyc_avx512_2_cores.jsonl: {}, stage 1, float32"
TABLE = {
    "cuda": dict.fromkeys(OPERATORS, _CUDA) | {"window_attention": _CUDA_ATTENTION},
    "cpu": {name: (Entry("cpu", _CPU_ROW.format(name)), Entry("reference")) for name in OPERATORS},
}
COMPILED = ("cuda", "cpu", "triton")
# What the arithmetic of kernels for GPUs takes. Movement takes any dtype; kernels for processors
# take all that the contracts allow.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_WIDTHS = (16, 32, 64)
# The widest rows that the CUDA C++ kernels normalise: where 8 divides a token's channels, and else.
# csrc/cuda/operators.h has the same numbers.
WIDEST, WIDEST_ODD = 8192, 5120
TRITON_VERSION = (3, 6)
CAPABILITY = (8, 0)
NOT_INTERPRETED = (
    "Triton's kernels run on CUDA tensors (on those of a CPU only interpreted, for tests, "
    "which takes TRITON_INTERPRET=1 in the environment from the start)"
)
NOT_EMULATED = (
    "the CUDA C++ kernels run on CUDA tensors (on those of a CPU only emulated, for tests, "
    "and here {})"
)
WRONG_IF_INTERPRETED = "Triton's interpreter computes bfloat16 wrongly, without saying so"
CURE = "use kernels='reference' or kernels='auto'"
TRACED = (
    "torch.jit.trace would keep the sizes of one call for all others; use torch.export.export, "
    "or for ONNX torch.onnx.export(dynamo=True)"
)
SCRIPTED = "torch.jit.script cannot compile it; use torch.compile or torch.export.export"


class Call(NamedTuple):
    """All of a call that decides which kernel sets can run it.

    Attributes:
        operator: its name.
        device_type: "cpu", "cuda", "meta", ...
        device_index: which of them, None for the current one.
        dtypes: those of the floating-point tensors (of all tensors for movement).
        head_width: channels of an attention head; None for an unknown one.
        has_dropout: whether attention weights are dropped.
        is_too_wide: whether rows to be normalised are (`is_too_wide`).
        is_transformed: whether a tensor has a tangent or stands in a transform of `torch.func`.
        is_for_onnx: whether `torch.onnx.export` makes the call.
    """

    operator: str
    device_type: str = "cpu"
    device_index: int | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    head_width: int | None = HEAD_WIDTHS[0]
    has_dropout: bool = False
    is_too_wide: bool = False
    is_transformed: bool = False
    is_for_onnx: bool = False


def check_word(where: str, kernels: object) -> str:
    """`kernels` if it is one of `WORDS`; raises ValueError naming them otherwise."""
    if kernels not in WORDS:
        raise ValueError(f"{where}: kernels must be one of {', '.join(WORDS)}, got {kernels!r}")
    return kernels


def known_width(width: int) -> int | None:
    """The head width as a constant: where it is traced, None for all but `HEAD_WIDTHS`."""
    # Spelt out: tracing with dynamic=True takes integers of a global for symbols, too.
    for known in (16, 32, 64):
        if width == known:
            return known
    return None if torch.compiler.is_compiling() else width


def is_too_wide(width: int, piece: int) -> bool:
    """Whether a row of `width` channels, made of pieces, is wider than registers hold."""
    # As a branch: a traced comparison would be a symbol, and the choice takes constants.
    if width > (WIDEST if piece % 8 == 0 else WIDEST_ODD):  # noqa: SIM103
        return True
    return False


def reason_against(kernels: str, call: Call) -> str | None:
    """Why a kernel set cannot run a call here, in words that end a sentence; None if it can."""
    if kernels == "reference":
        return None
    if call.has_dropout:
        return "its kernels have no dropout of attention weights, got dropout above 0"
    if call.is_transformed:
        return (
            "its kernels have no forward-mode derivatives and no transforms of torch.func, "
            "got a tensor with a tangent or within a transform"
        )
    if call.is_for_onnx:
        return "ONNX has no operators of its kernels, got a call by torch.onnx.export"
    if kernels == "cpu":
        return _against_cpu(call)
    return _against_arithmetic(call) or {"triton": _against_triton, "cuda": _against_cuda}[kernels](
        call
    )


def _against_cpu(call: Call) -> str | None:
    if call.device_type not in ("cpu", "meta"):
        return f"C++ kernels for processors run on CPU tensors, got {call.device_type}"
    return None if call.device_type == "meta" else extension.why_not("_ops_cpu")


def _against_arithmetic(call: Call) -> str | None:
    """What the kernels of Triton and CUDA do not compute anywhere."""
    if call.operator in MOVEMENT:
        return None
    for dtype in call.dtypes:
        if dtype not in DTYPES:
            names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            return f"its kernels take {names}, got {str(dtype).removeprefix('torch.')}"
    if call.operator == "window_attention" and call.head_width not in HEAD_WIDTHS:
        widths = ", ".join(map(str, HEAD_WIDTHS))
        got = "another" if call.head_width is None else call.head_width
        return f"its kernels take a head width of {widths} channels, got {got}"
    return None


def _against_device(kernels: str, call: Call) -> str | None:
    """What keeps kernels for a GPU from a device, before they are looked for."""
    if call.device_type not in ("cuda", "cpu", "meta"):
        return f"{kernels} kernels run on CUDA tensors, got {call.device_type}"
    if call.device_type != "cuda":
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU here"
    if torch.version.hip:
        return f"{kernels} kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    capability = torch.cuda.get_device_capability(call.device_index)
    if capability < CAPABILITY:
        needed, found = (".".join(map(str, v)) for v in (CAPABILITY, capability))
        return f"{kernels} kernels need a GPU of compute capability {needed}, this has {found}"
    return None


def _against_cuda(call: Call) -> str | None:
    reason = _against_device("CUDA C++", call)
    if reason is not None:
        return reason
    if call.is_too_wide:
        return (
            f"its kernels normalise at most {WIDEST} channels, {WIDEST_ODD} where 8 does not "
            "divide those of a token"
        )
    if call.device_type == "meta":
        return None
    if call.device_type == "cuda":
        return extension.why_not("_ops") or extension.why_not_started(call.device_index)
    reason = extension.why_not("_emulated")
    return reason and NOT_EMULATED.format(reason)


def _against_triton(call: Call) -> str | None:
    reason = _against_device("Triton", call)
    if reason is not None or call.device_type == "meta":
        return reason
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed; pip install triton"
    if tuple(int(part) for part in found.split(".")[:2]) < TRITON_VERSION:
        needed = ".".join(map(str, TRITON_VERSION))
        return f"Triton {needed} or newer is needed, {found} is installed"
    try:
        compiler = import_module("videoswin_kernels.triton._compiler")
    except ImportError as error:
        return f"Triton {found} cannot be imported: {error}"
    if call.device_type == "cuda":
        if compiler.IS_INTERPRETED:
            return "TRITON_INTERPRET is set, and then Triton runs on CPU tensors alone"
        return compiler.why_not_started()
    if not compiler.IS_INTERPRETED:
        return NOT_INTERPRETED
    if torch.bfloat16 in call.dtypes and call.operator not in MOVEMENT:
        return WRONG_IF_INTERPRETED
    return None


def choose(call: Call, kernels: str) -> Choice:
    """The kernel set that runs a call under a word.

    Raises:
        ValueError: an unknown word.
        UnavailableError: no kernel set that the word allows can run, with the reason of each.
    """
    operator = call.operator
    check_word(operator, kernels)
    if kernels in ("auto", "fused"):
        return _first_of_table(call, kernels)
    reason = reason_against(kernels, call)
    if reason is None:
        return Choice(operator, kernels, "asked for by name", None)
    raise UnavailableError(f"{operator}: kernels={kernels!r} cannot run: {reason}; {CURE}")


def _first_of_table(call: Call, kernels: str) -> Choice:
    device_type, operator = call.device_type, call.operator
    entries = {
        entry.kernels: entry
        for entry in TABLE.get(device_type, TABLE["cpu"])[operator]
        if kernels == "auto" or entry.kernels != "reference"
    }
    reasons = []
    for name in dict.fromkeys([*entries, *COMPILED]):
        reason = reason_against(name, call)
        if name not in entries:
            reason = reason or f"not for {device_type} tensors, except by name"
        if reason is None and kernels == "auto" and name == "cpu":
            reason = _against_level(device_type)
        if reason is None:
            why = "; ".join([f"first that runs on {device_type}", *reasons])
            return Choice(operator, name, why, entries[name].row)
        reasons.append(f"{name}: {reason}")
    said = "; ".join(reasons)
    raise UnavailableError(f"{operator}: kernels='fused' cannot run: {said}; {CURE}")


def _against_level(device_type: str) -> str | None:
    """Why `auto` leaves kernels for processors alone that `fused` takes; None if it does not."""
    if device_type != "cpu" or extension.cpu_level() != "baseline":
        return None
    return "no row has shown its kernels to be faster on a processor without AVX2"


# Filled by the first call of each kind; nothing that decides can change in a process.
_decided: dict[tuple[Call, str], tuple[str | None, str]] = {}


@torch.compiler.assume_constant_result
def _decide(kernels: str, *call: Any) -> tuple[str | None, str]:
    """(the kernel set, "") or (None, why not): once for each kind of call, also when traced."""
    # Whatever the word: Python asks of sizes once. They are tensors here, which are no keys.
    if torch.jit.is_tracing():
        return None, f"{call[0]}: {TRACED}"
    key = (Call(*call, _is_for_onnx()), kernels)
    if key not in _decided:
        try:
            _decided[key] = (choose(*key).kernels, "")
        except UnavailableError as error:
            _decided[key] = (None, str(error))
    return _decided[key]


def _is_for_onnx() -> bool:
    # Who calls torch.onnx.export has imported it, and no other caller shall have to.
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and torch.compiler.is_compiling() and onnx.is_in_onnx_export()


def refuse_script(who: nn.Module | Callable[..., Any]) -> NoReturn:
    """Refuses `torch.jit.script`, which calls what stands as `__prepare_scriptable__` first.

    Raises UnavailableError naming the function, or the class of the module.
    """
    raise UnavailableError(f"{getattr(who, '__name__', type(who).__name__)}: {SCRIPTED}")


def resolve(
    operator: str,
    kernels: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    head_width: int | None = HEAD_WIDTHS[0],
    has_dropout: bool = False,
    is_too_wide: bool = False,
    is_transformed: bool = False,
) -> str:
    """The name of the kernel set that runs a call; arguments as in `Call`, raises as `choose`."""
    check_word(operator, kernels)
    chosen, refusal = _decide(
        *(kernels, operator, device.type, device.index, dtypes),
        *(head_width, has_dropout, is_too_wide, is_transformed),
    )
    if chosen is None:
        raise UnavailableError(refusal)
    return chosen


@overload
def explain(module_or_operator: nn.Module, example: Tensor | None = None) -> list[Choice]: ...


@overload
def explain(
    module_or_operator: Callable[..., Any] | str, example: Tensor | None = None
) -> Choice: ...


def explain(
    module_or_operator: nn.Module | Callable[..., Any] | str, example: Tensor | None = None
) -> Choice | list[Choice]:
    """What would run, and why.

    Args:
        module_or_operator: an operator of this package (or its name), taken with kernels="auto",
            at a head width that kernels take; or a module, one of `model` or an accelerated one, as
            it would run now, training or not.
        example: a tensor of the device and dtype in question; default: the module's first
            parameter, or float32 on the CPU.

    Returns:
        A `Choice` for an operator; for a module a list of them, one for each (operator, word), and
        one with kernels "original" for each part of an accelerated one that keeps its own code.

    Raises:
        ValueError: an unknown operator, or a module without one.
        UnavailableError: what the module asks for cannot run, with the reason.
    """
    if isinstance(module_or_operator, nn.Module):
        return _explain_module(module_or_operator, example)
    operator = getattr(module_or_operator, "__name__", module_or_operator)
    if operator not in OPERATORS:
        names = ", ".join(OPERATORS)
        raise ValueError(f"explain: operator must be one of {names}, got {module_or_operator!r}")
    return choose(Call(operator, *_place(example)), "auto")


def _place(example: Tensor | None) -> tuple:
    """Device type, device index and dtypes of a call on `example`."""
    if example is None:
        return "cpu", None, (torch.float32,)
    return example.device.type, example.device.index, (example.dtype,)


def takes_word(module: nn.Module) -> bool:
    """Whether a module says which operator it uses, and with which word, as those of `model` do."""
    operator, kernels = (getattr(module, name, None) for name in ("operator", "kernels"))
    # A stranger's attributes of these names may be anything.
    are_names = isinstance(operator, str) and isinstance(kernels, str)
    return are_names and operator in OPERATORS and kernels in WORDS


def _explain_module(module: nn.Module, example: Tensor | None) -> list[Choice]:
    # Imported here, as it imports the operators, which import this file.
    from videoswin_kernels.accelerate import uses_of

    place = _place(next(module.parameters(), None) if example is None else example)
    users = [m for m in module.modules() if takes_word(m)]
    uses = list(uses_of(module))
    if not users and not uses:
        raise ValueError(f"explain: {type(module).__name__} holds no module that uses an operator")
    calls = {}
    for user in users:
        width = known_width(getattr(user, "head_width", HEAD_WIDTHS[0]))
        has_dropout = user.training and getattr(user, "attn_drop", 0) > 0
        calls[Call(user.operator, *place, width, has_dropout), user.kernels] = None
    kept = []
    for path, word, use in uses:
        if use.why_not is None:
            calls[Call(use.operator, *place, use.head_width), word] = None
        else:
            who = ".".join(filter(None, [path, use.where])) or type(module).__name__
            kept.append(Choice(use.operator, "original", f"{who} {use.why_not}", None))
    return [*dict.fromkeys(choose(*key) for key in calls), *kept]


def device_types() -> list[str]:
    """Device types of this machine, CPU first."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
