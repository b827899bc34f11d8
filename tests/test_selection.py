"""The word `kernels`: what each value chooses, refuses and explains."""

import re
import subprocess
import sys
from pathlib import Path

import operator_suite as suite
import pytest
import torch
from torch import nn

import videoswin_kernels

ROOT = Path(__file__).parents[1]
OPERATOR = pytest.mark.parametrize("operator", suite.OPERATORS)


def equal(one, other):
    """Whether two results, tensors or tuples of them, are the same bits."""
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(torch.equal(*pair) for pair in pairs)


@OPERATOR
@pytest.mark.parametrize("word", suite.NAMED)
def test_every_kernel_set_is_asked_the_operator_s_questions(operator, word):
    reason = suite.reason_against(operator, word)
    if reason is not None:
        pytest.skip(reason)
    assert word in suite.kernel_sets(operator)


@OPERATOR
def test_auto_is_what_explain_says_and_the_default(operator):
    chosen = videoswin_kernels.explain(operator).kernels
    auto = suite.smallest_call(operator, "auto")
    assert equal(auto, suite.smallest_call(operator, chosen))


@OPERATOR
@pytest.mark.parametrize("word", ["fast", "", "Reference", "auto ", "torch", None, 3, True])
def test_an_unknown_word_is_refused_with_the_known_ones(operator, word):
    with suite.refuses(operator, "kernels", word) as caught:
        suite.smallest_call(operator, word)
    said = str(caught.value).partition("got ")[0]
    assert all(known in said for known in suite.WORDS)


@OPERATOR
@pytest.mark.parametrize("word", ["fused", *suite.NAMED])
def test_an_unsupported_set_is_refused_with_reason_and_cure(operator, word):
    """It must not become the reference: a call either runs the set asked for or raises."""
    if word in suite.kernel_sets(operator):
        pytest.skip(f"{word} runs here")
    if word == "fused" and videoswin_kernels.explain(operator).kernels != "reference":
        pytest.skip("fused runs here")
    with pytest.raises((ValueError, RuntimeError)) as caught:
        suite.smallest_call(operator, word)
    message = str(caught.value)
    assert "\n" not in message
    assert re.match(rf"{operator}: .*\b{word}\b", message), message
    reason, cure = message.rsplit("; ", 1)
    assert len(reason) > len(f"{operator}: kernels='{word}'"), message
    assert re.search(r"use kernels='(reference|auto)'", cure), message


@OPERATOR
def test_refusal_does_not_depend_on_an_earlier_call(operator):
    if videoswin_kernels.explain(operator).kernels != "reference":
        pytest.skip("fused runs here")
    messages = set()
    for _ in range(2):
        suite.smallest_call(operator, "reference")
        suite.smallest_call(operator, "auto")
        with pytest.raises((ValueError, RuntimeError)) as caught:
            suite.smallest_call(operator, "fused")
        messages.add(str(caught.value))
    assert len(messages) == 1


@OPERATOR
def test_a_refusal_is_the_same_sentence_under_compile(operator):
    if videoswin_kernels.explain(operator).kernels != "reference":
        pytest.skip("fused runs here")
    with pytest.raises((ValueError, RuntimeError)) as caught:
        suite.smallest_call(operator, "fused")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda: suite.smallest_call(operator, "fused"), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match=re.escape(str(caught.value))):
        compiled()
    torch._dynamo.reset()


@OPERATOR
def test_explain_an_operator_by_function_and_by_name(operator):
    row = videoswin_kernels.explain(getattr(videoswin_kernels, operator))
    assert row._fields == ("operator", "kernels", "reason", "row")
    assert row == videoswin_kernels.explain(operator)
    assert row == tuple(row)
    assert row.operator == operator
    assert row.kernels in suite.WORDS[2:]
    assert isinstance(row.reason, str)
    assert row.reason
    assert row.row is None or isinstance(row.row, str)


@OPERATOR
def test_explain_with_an_example_of_a_cpu_tensor(operator):
    row = videoswin_kernels.explain(operator, torch.zeros(1, 4, 6, 6, 96))
    assert row.operator == operator
    # CPU tensors never get kernels for a GPU from auto.
    assert row.kernels in ("reference", "cpu")


class Part(nn.Module):
    """What explain looks for in a model: the operator's name and the word."""

    def __init__(self, operator, kernels):
        super().__init__()
        self.operator, self.kernels = operator, kernels


def test_explain_a_module_lists_its_operators():
    model = nn.Sequential(
        Part("window_attention", "auto"),
        nn.Linear(2, 2),
        nn.Sequential(Part("patch_merging", "reference"), nn.ReLU()),
    )
    for example in (None, torch.zeros(1, 4, 6, 6, 96)):
        rows = videoswin_kernels.explain(model, example)
        assert isinstance(rows, list)
        named = {row.operator: row for row in rows}
        assert set(named) == {"window_attention", "patch_merging"}
        assert named["patch_merging"].kernels == "reference"
        for row in rows:
            assert row._fields == ("operator", "kernels", "reason", "row")


@pytest.mark.parametrize("what", ["attention", "", 3, torch.relu])
def test_explain_refuses_what_is_no_operator(what):
    with pytest.raises((ValueError, TypeError), match=r"^explain: .*got "):
        videoswin_kernels.explain(what)


def test_the_support_table_names_every_operator_and_every_word():
    done = subprocess.run(
        [sys.executable, "-m", "videoswin_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The library never warns.
    assert done.stderr == ""
    for word in (*suite.OPERATORS, *suite.WORDS):
        assert re.search(rf"\b{word}\b", done.stdout), f"{word} is not in:\n{done.stdout}"
