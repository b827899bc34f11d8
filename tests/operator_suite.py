"""What the operators' tests share: who runs where, inputs, budget, refusals, compile.

Each test is asked of every kernel set on every device it runs on (`every`). Inputs are made on the
CPU; a `Run` moves them to its device and the results back, through which gradients flow, so that
leaves and judges stay on the CPU.
"""

import contextlib
import functools
import re
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing

import videoswin_kernels

OPERATORS = (
    "cyclic_shift",
    "window_partition",
    "window_reverse",
    "window_attention",
    "patch_merging",
    "residual_norm",
)
MOVEMENT = OPERATORS[:3]
WORDS = ("auto", "fused", "reference", "triton", "cuda", "cpu")
NAMED = ("triton", "cuda", "cpu")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LOW = (torch.float16, torch.bfloat16)
# What is only moved may be anything.
MOVED = (*DTYPES, torch.bool, torch.uint8, torch.int16, torch.int64, torch.complex64)
REFUSAL = r"^{}: kernels='{}' cannot run: .+; use kernels='reference' or kernels='auto'$"


class Run(NamedTuple):
    """A kernel set on a device."""

    kernels: str
    device: str

    @property
    def is_interpreted(self):
        """Whether kernels run a Python step at a time, and many programs take minutes."""
        return self == ("triton", "cpu")

    def __call__(self, function, *inputs, **options):
        """The operator's results on the CPU, computed by the kernel set on the device."""
        return self.plain(function, *inputs, kernels=self.kernels, **options)

    def plain(self, function, *inputs, **options):
        """The same for a function that knows no kernel sets."""
        options = {name: self.put(value) for name, value in options.items()}
        results = function(*map(self.put, inputs), **options)
        return tuple(r.cpu() for r in results) if isinstance(results, tuple) else results.cpu()

    def put(self, value):
        """A tensor on the device; anything else as it is."""
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def leaf(self, value):
        """The same values on the device, a leaf that requires a gradient as they do."""
        return self.put(value.detach()).requires_grad_(value.requires_grad)

    def operator(self, name):
        """The registered operator of the kernel set."""
        return getattr(getattr(torch.ops, f"videoswin_{self.kernels}"), name).default

    def dtypes(self, operator):
        """What the operator takes under this kernel set; it refuses the rest."""
        if operator in MOVEMENT:
            return MOVED
        if self.kernels == "triton" and self.is_interpreted:
            # Triton's interpreter is silently wrong in bfloat16.
            return (torch.float32, torch.float16)
        return DTYPES[1:] if self.kernels in ("triton", "cuda") else DTYPES


def smallest_call(operator, kernels, device="cpu", dtype=torch.float32, grad=False):
    """Runs the operator on one token."""
    function = getattr(videoswin_kernels, operator)
    ones = functools.partial(torch.ones, dtype=dtype, device=device)
    x = ones(1, 1, 1, 1, 32, requires_grad=grad)
    one = {"window": (1, 1, 1), "kernels": kernels}
    if operator == "cyclic_shift":
        return function(x, (0, 0, 0), kernels=kernels)
    if operator == "window_partition":
        return function(x, **one)
    if operator == "window_reverse":
        return function(x.view(1, 1, 32), grid=(1, 1, 1), **one)
    if operator == "window_attention":
        qkv = ones(1, 1, 1, 1, 96, requires_grad=grad)
        return function(qkv, ones(1, 1), num_heads=1, **one)
    if operator == "patch_merging":
        return function(x, ones(128), ones(128), kernels=kernels)
    return function(x, x, ones(32), ones(32), kernels=kernels)


@functools.cache
def reason_against(operator, word, device="cpu"):
    """The sentence with which the operator refuses a kernel set here, or None if it runs.

    The reference is not asked: when it breaks, its tests shall fail, not skip. Nor is any other
    error a refusal: a set that breaks shall fail its tests, too.
    """
    if word == "reference":
        return None
    try:
        smallest_call(operator, word, device)
    except Exception as error:
        if re.search(REFUSAL.format(operator, word), str(error)):
            return str(error)
    return None


@functools.cache
def runs(operator):
    """Every kernel set on every device it runs on.

    The others are skipped once per operator, with their reason, in test_selection.py: one line
    to read in place of one for every question.
    """
    words = ("reference", *NAMED)
    return [
        Run(word, device)
        for word in words
        for device in DEVICES
        if reason_against(operator, word, device) is None
    ]


def kernel_sets(operator):
    """The kernel sets that run on CPU tensors."""
    return [run.kernels for run in runs(operator) if run.device == "cpu"]


def every(operator, dtypes=None, *, compiled=False, device=None):
    """Asks a test of every run, as `run`, and of those dtypes that it takes, as `dtype`.

    `compiled` leaves the reference out, `device` all other devices.
    """
    chosen = [
        run
        for run in runs(operator)
        if not (compiled and run.kernels == "reference") and device in (None, run.device)
    ]
    where = f" on {device}" if device else ""
    absent = pytest.mark.skip(f"no {'compiled ' * compiled}kernel set runs here{where}")
    if dtypes is None:
        nobody = [pytest.param(None, marks=absent, id="nobody")]
        return pytest.mark.parametrize("run", chosen or nobody, ids=lambda run: "-".join(run))
    pairs = [(run, dtype) for run in chosen for dtype in dtypes if dtype in run.dtypes(operator)]
    names = [f"{'-'.join(run)}-{str(dtype).removeprefix('torch.')}" for run, dtype in pairs]
    if not pairs:
        pairs, names = [pytest.param(None, None, marks=absent)], ["nobody"]
    return pytest.mark.parametrize(("run", "dtype"), pairs, ids=names)


def skip_absent(operator, run):
    """Skips a test that asks several operators where a kernel set has not this one."""
    if run not in runs(operator):
        pytest.skip(f"{run.kernels} has no {operator}")


def random(*shape, dtype=torch.float64, std=1.0, grad=False):
    """Normal values that are exact in the dtype."""
    return (torch.randn(*shape, dtype=torch.float64) * std).to(dtype).requires_grad_(grad)


def anything(*shape, dtype):
    """Values of any dtype, of both signs and both truths where it has them."""
    values = torch.randn(*shape, dtype=torch.float64)
    if dtype == torch.bool:
        return values > 0
    if dtype.is_complex:
        return torch.complex(values, values.flip(-1)).to(dtype)
    return (values if dtype.is_floating_point else values.mul(30).abs()).to(dtype)


def layouts(x):
    """(name, same values in another layout): every stride and offset a caller can bring."""
    kind = {"dtype": x.dtype, "device": x.device}
    channels_first = x.movedim(-1, 1).contiguous().movedim(1, -1)
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 9.0, dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 3), 9.0, **kind)
    padded[..., 3:] = x
    batch = torch.full((x.shape[0] + 1, *x.shape[1:]), 9.0, **kind)
    batch[1:] = x
    shifted = torch.full((x.numel() + 1,), 9.0, **kind)
    shifted[1:] = x.flatten()
    result = {
        "channels first": channels_first,
        "every second channel": wide[..., ::2],
        "rows apart and offset": padded[..., 3:],
        "second of a batch": batch[1:],
        "unaligned": shifted[1:].view(x.shape),
        "axes swapped": x.transpose(1, -2).contiguous().transpose(1, -2),
    }
    for name, view in result.items():
        assert torch.equal(view, x), name
    return result


def exact_leaf(value):
    """A float64 leaf that requires grad, with the values of a tensor (None stays None)."""
    return None if value is None else value.detach().double().requires_grad_()


def gradients(output, inputs, weight):
    """Gradients of the weighted sum, so that no symmetry hides a wrong one."""
    return torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs)


def assert_budget(got, exact, naive, dtype=None):
    """Error to float64 <= 2 x that of the naive implementation in the dtype + one rounding.

    Beside it what is below the normal numbers of float32, which a GPU's exponential takes for 0.
    In float64, which nothing is more exact than, it may differ as the order of sums lets it.
    """
    dtype = dtype or got.dtype
    assert got.dtype == dtype
    assert got.shape == exact.shape == naive.shape
    assert torch.isfinite(got).all()
    if got.numel() == 0:
        return
    exact = exact.detach().double()
    error = (got.detach().double() - exact).abs().max().item()
    own = (naive.detach().double() - exact).abs().max().item()
    relative = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    rounding = relative * exact.abs().max().item()
    rounding += torch.finfo(torch.float32).tiny
    assert error <= 2 * own + rounding, f"error {error:.3e}, naive {own:.3e} + {rounding:.3e}"


def assert_near_loops(got, judged):
    """Equal to a float64 judge but for the order of float64 sums."""
    assert got.dtype == torch.float64
    assert got.shape == judged.shape
    torch.testing.assert_close(got.detach(), torch.from_numpy(judged), rtol=1e-12, atol=1e-12)


@contextlib.contextmanager
def refuses(operator, argument, got, kind=(ValueError, TypeError)):
    """Expects one sentence that names the operator, the argument and what was got."""
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message, message
    assert not re.search(r"\. [A-Z]", message), f"more than one sentence: {message}"
    assert message.startswith(f"{operator}: "), message
    assert re.search(rf"\b(?:{argument})\b", message), message
    forms = {str(got), repr(got)}
    if isinstance(got, tuple | list):
        forms |= {str(list(got)), str(tuple(got))}
    said = message.partition("got ")[2]
    assert any(form in said for form in forms), f"{message!r} does not say that it got {got!r}"


def assert_compiles(run, function, make_inputs, *, exact):
    """The traced function equals eager, outputs and gradients, for changing batch sizes.

    At most two graphs: the first is static, the second has the batch size as a symbol.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=None)
    for batch in (2, 3, 5):
        inputs = [run.leaf(value) for value in make_inputs(batch)]
        results = []
        for call in (function, compiled):
            outputs = call(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            total = sum((output * output.detach().cos()).sum() for output in outputs)
            results.append((*outputs, *torch.autograd.grad(total, inputs)))
        for eager, traced in zip(*results, strict=True):
            tolerance = 0.0 if exact else 1e-5
            torch.testing.assert_close(traced, eager, rtol=tolerance, atol=tolerance)
    assert counter.frame_count <= 2
    torch._dynamo.reset()
