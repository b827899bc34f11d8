"""Conditions every test runs under: few threads, a fixed seed, NaN in fresh memory.

On a machine without a GPU, Triton's kernels are interpreted: one process cannot both interpret and
compile them, and Triton asks for the variable once, when it is imported. A user's setting wins.
"""

import os
from collections import Counter

# cuBLAS reads this once, when CUDA starts, and deterministic algorithms need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# A process beside others has a core to itself, and so have its children: threads of one that wait
# for each other would take it from the others.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from http_suite import running_server

from model.weights import download
from videoswin_kernels import extension, selection

torch.set_num_threads(min(2, torch.get_num_threads()))

seconds = Counter()


def pytest_addoption(parser):
    help = "of threads and blocks in emulated CUDA kernels: backward, newest, random:SEED"
    parser.addoption("--emulated-order", default="forward", help=help)


def pytest_configure(config):
    order, _, seed = config.getoption("--emulated-order").partition(":")
    if order != "forward":
        if extension.why_not("_emulated") is not None:
            pytest.exit(f"--emulated-order: {extension.why_not('_emulated')}", returncode=5)
        control = extension.control()
        control.set_settings(**{**control.settings(), "order": order, "seed": int(seed or 0)})


# Interpreted, the cases of each take seven seconds or more; other kernel sets answer at once.
SLOW_INTERPRETED = (
    "test_an_axis_equal_to_its_window_has_no_shift",
    "test_checkpointing_gives_the_same_gradients",
    "test_compiles_to_one_graph_for_all_batch_sizes",
    "test_every_combination_of_gradients_gives_the_same_bits",
    "test_flops_of_attention_in_a_cold_process_are_those_of_the_two_products",
    "test_gradients_are_the_same_each_time_without_deterministic_algorithms",
    "test_gradients_are_what_each_pair_of_places_adds",
    "test_gradients_in_windows_of_a_real_model",
    "test_gradients_of_every_head_width_without_pad_qkv",
    "test_gradients_of_every_layout",
    "test_gradients_of_one_dominant_score",
    "test_gradients_of_pads_in_closed_form",
    "test_gradients_over_several_tiles_windows_clips_and_heads",
    "test_gradients_under_large_biases",
    "test_gradients_where_channels_have_means",
    "test_memory_beyond_the_gradients_is_two_arrays_and_partial_sums",
    "test_table_gradient_sums_over_many_windows_the_same_each_time",
    "test_the_golden_cases",
    "test_the_same_bits_whatever_memory_held_before",
    "test_two_steps_have_the_losses_of_the_reference",
    "test_window_attention",
    "test_window_attention_backward",
)


# Files that take minutes: begun first, or one process is busy with the last of them alone.
LONGEST = (
    *("triton_compiles", "attention", "sanitized", "attention_windows", "first_touch"),
    *("kernel_sets", "demo", "attention_backward", "build", "train_kernels", "cuda_attention"),
    *("cpu_sanitized", "bench_attention", "train", "train_commands"),
)


def place_of(item):
    """Where the file of a test stands in the order."""
    name = item.path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Long files first; leaves to `make verify` what takes long where Triton is interpreted."""
    items.sort(key=place_of)
    for item in items:
        run = item.callspec.params.get("run") if hasattr(item, "callspec") else None
        if item.name.partition("[")[0] in SLOW_INTERPRETED and run and run.is_interpreted:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.interpreted)


def pytest_runtest_logreport(report):
    """Adds up what each file takes, fixtures included."""
    seconds[report.nodeid.partition("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter):
    """Prints the files that take longest: the whole suite has ten minutes on two cores."""
    terminalreporter.section("seconds per file")
    for name, duration in seconds.most_common(12):
        terminalreporter.write_line(f"{duration:7.1f}  {name}")


@pytest.fixture(autouse=True)
def deterministic():
    """Deterministic algorithms fill fresh memory with NaN, so that an unwritten output shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture
def one_thread():
    """For what is small: threads that wait for each other take seconds where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def control():
    """Sets how the emulator runs; as it was, afterwards."""
    if extension.why_not("_emulated") is not None:
        pytest.skip(f"no emulated kernels here: {extension.why_not('_emulated')}")
    try:
        module = extension.control()
    except ImportError as error:
        pytest.skip(str(error))
    before = module.settings()
    yield module
    module.set_settings(**before)


@pytest.fixture
def no_libraries(monkeypatch):
    """A process whose C++ libraries are not built."""
    missing = extension.Loaded(f"the C++ library is not built; run {extension.BUILD}", {})
    monkeypatch.setattr(extension, "_loaded", dict.fromkeys(extension.NAMESPACES, missing))
    monkeypatch.setattr(selection, "_decided", {})


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine, reached without proxies, and no pauses between attempts."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "*")
    monkeypatch.setattr(download, "PAUSE", 0)
    with running_server() as server:
        yield server


@pytest.fixture
def untouched(monkeypatch):
    """Makes tensors larger than there is memory for, of which few pages are ever touched."""
    copy = torch.UntypedStorage.copy_

    def copy_others(self, source, *options):
        # Triton's interpreter copies storages back, those of CPU tensors onto themselves.
        same = self.data_ptr() == source.data_ptr()
        return self if same else copy(self, source, *options)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_others)

    def make(*shape, dtype, device="cpu"):
        with monkeypatch.context() as context:
            context.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
            try:
                return torch.empty(*shape, dtype=dtype, device=device)
            except RuntimeError as error:
                pytest.skip(f"no room for {list(shape)}: {str(error).splitlines()[0]}")

    return make


@pytest.fixture
def far(untouched):
    """Moves the values of a tensor to where offsets pass 2^31, by a stride along one axis."""

    def spread(x, axis=0):
        assert x.shape[axis] == 2
        memory = untouched(2**32, dtype=x.dtype, device=x.device)
        strides = list(x.contiguous().stride())
        strides[axis] = 2**31 + 2**10
        return memory.as_strided(x.shape, strides).copy_(x.detach())

    return spread
