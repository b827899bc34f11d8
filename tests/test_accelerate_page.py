"""The code of docs/accelerate.md, run; their structures stand in for upstream and mmaction2."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import operator_suite as suite
import pytest
import torch
from official_structures import mm, official

from videoswin_kernels import explain

PAGE = (Path(__file__).parents[1] / "docs" / "accelerate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

pytestmark = pytest.mark.skipif(
    suite.reason_against("window_attention", "cpu") is not None, reason="needs the C++ kernels"
)


def test_the_page_has_these_blocks():
    assert len(BLOCKS) == 4


def test_torchvision(capsys):
    names = {}
    exec(BLOCKS[1], names)
    assert names["logits"].shape == (1, 400)
    assert "kernels='cpu'" in capsys.readouterr().out
    assert "original" not in {choice.kernels for choice in explain(names["model"])}


@pytest.mark.parametrize(("block", "classes"), [(2, official), (3, mm)])
def test_upstream_and_mmaction2(block, classes, monkeypatch):
    model = classes.SwinTransformer3D()
    clips = torch.randn(1, 3, 4, 20, 28)
    expected = model(clips)
    runner = ModuleType("mmengine.runner")
    runner.Runner = SimpleNamespace(from_cfg=lambda config: SimpleNamespace(model=model))
    monkeypatch.setitem(sys.modules, "mmengine", ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.runner", runner)
    names = {"config": SimpleNamespace(model=None), "build_model": lambda config: model}
    exec(BLOCKS[0].partition("\n\n")[0] + "\n" + BLOCKS[block], names)
    assert {choice.kernels for choice in explain(model)} == {"cpu"}
    torch.testing.assert_close(model(clips), expected)
