"""What nvcc made of the CUDA C++ kernels, read from the library: nothing spilt, wide accesses."""

import re
from itertools import product

import pytest

from bench import machine_code
from videoswin_kernels import extension
from videoswin_kernels.testing import HEAD_WIDTHS

# Instances of the kernels that multiply rows of a head: type, and width of a head or frames.
MULTIPLY = re.compile(
    r"(attention_forward|attention_canonical|query_gradient|key_value_gradient|bias_gradient)"
    r"_kernel<(float32|float16|bfloat16), (\d+)>"
)
# Threads of a block, where neither a layout nor the rule below says them.
THREADS = {
    "column_sums_kernel": 512,
    "table_gradient_kernel": 512,
    **{f"attention_canonical_kernel<{t}, 8>": 7 * 32 for t in ("float16", "bfloat16")},
    **{f"attention_canonical_kernel<{t}, 16>": 13 * 32 for t in ("float16", "bfloat16")},
}
FACTS = extension.build_facts("_ops")
# Reading it takes most of a minute; that nothing is spilt the build itself has made sure of.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FACTS.get("cuda") is None, reason="_ops.so has no CUDA kernels here"),
    pytest.mark.skipif(machine_code.cuobjdump() is None, reason="there is no cuobjdump here"),
]


@pytest.fixture(scope="module")
def rows():
    return machine_code.read()


@pytest.fixture(scope="module")
def multiplying():
    """(architecture, kernel, type, number of the template, how many of each instruction)."""
    found = [
        (architecture, *match.groups(), count)
        for (architecture, mangled), count in machine_code.instructions().items()
        if (match := MULTIPLY.fullmatch(machine_code.short(mangled)))
    ]
    assert found
    return found


def test_every_architecture_has_machine_code_of_every_kernel(rows):
    # "90a-real" is machine code, "80-virtual" what the driver compiles for others.
    built = {
        f"sm_{name.removesuffix('-real')}"
        for name in FACTS["architectures"]
        if not name.endswith("-virtual")
    }
    assert {row.architecture for row in rows} == built
    names = [sorted(row.name for row in rows if row.architecture == each) for each in built]
    assert all(each == names[0] for each in names)
    assert len(names[0]) == len(set(names[0]))
    for kernel in ("gather_rows", "residual_norm", "residual_norm_backward", "column_sums"):
        assert any(re.match(rf"{kernel}_kernel\b", name) for name in names[0]), kernel
    assert {"spread_tables_kernel", "table_gradient_kernel"} <= set(names[0])


def test_attention_has_an_instance_for_each_type_and_width(rows):
    built = {match.groups() for row in rows if (match := MULTIPLY.fullmatch(row.name))}
    halves = ("float16", "bfloat16")
    generic = ("attention_forward", "query_gradient", "key_value_gradient", "bias_gradient")
    expected = {
        *product(generic, ("float32", *halves), map(str, HEAD_WIDTHS)),
        *product(["attention_canonical"], halves, ("8", "16")),
    }
    assert built == expected


def test_nothing_is_spilt(rows):
    for row in rows:
        assert row.stack == 0, row
        assert row.mix["local memory"] == 0, row


def test_all_shared_memory_is_asked_for_at_the_launch(rows):
    for row in rows:
        # From sm_90 on the driver keeps 1 KB of its own in a kernel that uses shared memory.
        level = int(re.search(r"\d+", row.architecture)[0])
        assert row.shared in (0, 1024 * (level >= 90)), row


def test_tensor_cores_multiply_halves_and_no_float32(multiplying):
    for architecture, kernel, number, _, count in multiplying:
        products = {name for name in count if re.match("[HQIDB]G?MMA", name)}
        what = (architecture, kernel, number)
        if number == "float32":
            # On tensor cores it would be rounded to 10 bits.
            assert not products, what
            assert count["FFMA"] > 100, what
        else:
            end = "F32.BF16" if number == "bfloat16" else "F32"
            assert products == {f"HMMA.16816.{end}"}, what


def test_halves_are_loaded_as_matrices_and_all_is_copied_asynchronously(multiplying):
    for architecture, kernel, number, _, count in multiplying:
        what = (architecture, kernel, number)
        loads = {name for name in count if name.startswith("LDSM")}
        # Four matrices at once; those by which weights are multiplied are transposed.
        plain, turned = {"LDSM.16.M88.4"}, {"LDSM.16.MT88.4"}
        has_weights = kernel != "bias_gradient"
        expected = set() if number == "float32" else plain | (turned if has_weights else set())
        assert loads == expected, what
        assert any(re.match(r"LDGSTS\..*128$", name) for name in count), what


def test_no_access_asks_which_memory_it_is(rows):
    for row in rows:
        assert row.mix["generic memory"] == 0, row


def test_vectors_of_16_bytes_are_read_and_written_as_such(rows):
    for row in rows:
        if MULTIPLY.fullmatch(row.name):
            continue
        is_wide = row.name == "gather_rows_kernel<16>" or row.name.endswith(", 8>")
        assert (row.mix["16-byte loads"] > 0) == is_wide, row
        assert (row.mix["16-byte stores"] > 0) == is_wide, row


def test_the_page_has_a_line_for_every_kernel(rows):
    page = machine_code.PAGE.read_text(encoding="utf-8")
    written = set(re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE))
    assert written == {row.name for row in rows}, "python bench/machine_code.py --write"


def test_a_block_may_have_as_many_threads_as_it_is_launched_with(rows):
    """The emulator does not know of `__launch_bounds__`; a GPU refuses a larger block."""
    found = machine_code.bounds()
    assert set(found) == {(row.architecture, row.name) for row in rows}
    for (_, name), threads in found.items():
        layout = re.search(r"_kernel<(\d+), \d+, \d+>", name)
        launched = 128 if MULTIPLY.fullmatch(name) else 256
        launched = THREADS.get(name, max(128, int(layout[1])) if layout else launched)
        assert threads == launched, name
