"""Every numbered trap of upstream has a test that would fall into it, marked with its number."""

import ast
from pathlib import Path

TESTS = sorted(Path(__file__).parent.glob("test_*.py"))

# 1-7: clamping, regions, the mask and the padding of windows.
# 8: places of a kernel's tile that are none of the window.
# 9-13: roll, window order, packing and precision of the attention.
# 14-20: the block, merging, stochastic depth, checkpointing and freezing.
# 21-23: gradients of tables, biases and pads.
# 24-26: foreign weights: the stored index, windows of another depth, inflation of 2-D ones.
# 27-32: norms, the time axis, head, half precision, memory of masks, strides.
# 33-34: parameter groups of the optimiser, sampling of frames.
REQUIRED = set(range(1, 35))


def marked(source: str) -> dict[str, set[int]]:
    """The numbers that `pytest.mark.trap` gives each test function of a file, by its name."""
    tree = ast.parse(source)
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found[node.name] = {
                argument.value
                for decorator in node.decorator_list
                if isinstance(decorator, ast.Call)
                and ast.unparse(decorator.func) == "pytest.mark.trap"
                for argument in decorator.args
                if isinstance(argument, ast.Constant)
            }
    return found


def all_marked() -> set[int]:
    return {
        number
        for path in TESTS
        for numbers in marked(path.read_text(encoding="utf-8")).values()
        for number in numbers
    }


def test_every_required_trap_has_a_test():
    assert REQUIRED - all_marked() == set()


def test_no_test_is_marked_with_a_trap_that_is_not_listed():
    assert all_marked() - REQUIRED == set()


def test_marks_are_found_on_tests_and_nowhere_else():
    source = """
@pytest.mark.trap(3)
@pytest.mark.trap(5)
@pytest.mark.parametrize("trap", [7])
def test_something(): pass
# @pytest.mark.trap(11)
@pytest.mark.trap(13)
def helper(): pass
"""
    assert marked(source) == {"test_something": {3, 5}}
