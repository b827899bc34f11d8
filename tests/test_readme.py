"""The commands of README.md that make a model of one's own videos, as they stand there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("tyro")

from train.synthetic import write_dataset

ROOT = Path(__file__).parents[1]
# Of a size that a processor trains in seconds; and no network.
SMALL = (
    "--model.name=swin_nano --model.weights= --model.fresh --data.clip-len=4 --data.interval=1 "
    "--data.short-side=32 --data.crop=32 --data.test-short-side=32 --data.val-short-side=32 "
    "--data.workers=1 --loop.epochs=1 --device=cpu"
)


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"in three commands:\n\n```\n(.*?)```", text, re.DOTALL)
    return [line.partition("#")[0].strip() for line in block.splitlines()]


@pytest.mark.slow
def test_three_commands_make_a_model_of_ones_own_videos(tmp_path):
    write_dataset(
        tmp_path / "all",
        videos_per_class=4,
        test_videos_per_class=0,
        frames=8,
        width=64,
        height=48,
        workers=1,
    )
    shutil.copytree(tmp_path / "all" / "train", tmp_path / "videos")
    lines = commands()
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "python"
        if "--recipe" in words:
            words += shlex.split(SMALL)
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((tmp_path / "runs/mine/test/evaluation.json").read_text())
    # One of the four of each of the eight classes.
    assert told["videos"] == 8
    assert told["broken"] == 0
    assert told["views"] == "4 x 3"
