"""What nvcc made of the CUDA C++ kernels, read from the library: nothing spilt, wide accesses."""

import re

import pytest

from bench import machine_code
from videoswin_kernels import extension

FACTS = extension.build_facts("_ops")
pytestmark = [
    pytest.mark.skipif(FACTS.get("cuda") is None, reason="_ops.so has no CUDA kernels here"),
    pytest.mark.skipif(machine_code.cuobjdump() is None, reason="there is no cuobjdump here"),
]


@pytest.fixture(scope="module")
def rows():
    return machine_code.read()


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


def test_nothing_is_spilt(rows):
    for row in rows:
        assert row.stack == 0, row
        assert row.mix["local memory"] == 0, row


def test_all_shared_memory_is_asked_for_at_the_launch(rows):
    for row in rows:
        # From sm_90 on the driver keeps 1 KB of its own in a kernel that uses shared memory.
        level = int(re.search(r"\d+", row.architecture)[0])
        assert row.shared in (0, 1024 * (level >= 90)), row


def test_vectors_of_16_bytes_are_read_and_written_as_such(rows):
    for row in rows:
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
        launched = {"column_sums_kernel": 512}.get(name, 256)
        assert threads == (max(128, int(layout[1])) if layout else launched), name
