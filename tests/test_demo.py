"""The main job, as `make demo` runs it: minutes long, so only `make verify` does."""

import re
import subprocess
import sys

import pytest
from train_suite import ROOT


def run(*words):
    result = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_demo_learns_motion_and_nothing_else(tmp_path):
    videos, output = tmp_path / "videos", tmp_path / "run"
    run("train.synthetic", str(videos))
    run("train", "--recipe", "demo", "--output", str(output), f"--data.root={videos}")
    checkpoint = ["--checkpoint", str(output / "last.pt")]
    said = run("train.evaluate", *checkpoint, "--frame-orders")
    rows = {
        name: (float(top1), float(opposite))
        for name, top1, opposite in re.findall(r"^(\w.*?)\s{2,}([\d.]+)%\s+([\d.]+)%$", said, re.M)
    }
    assert rows["as filmed"][0] >= 90
    assert rows["one frame repeated"][0] <= 30
    # Opposites share their frames, so half is the best a model blind to order can do.
    assert rows["random order"][0] <= 60
    assert rows["backwards"][1] >= 80
    video = next((videos / "test" / "growing").glob("*.mp4"))
    assert re.search(r"1\. \w", run("train.predict", str(video), *checkpoint))
    said = run("train.speed", "--recipe", "demo")
    assert re.search(r"^fused: ([\d.]+ clips/s \(.+ operators?\)|.+ cannot run: .+)$", said, re.M)
    assert re.search(r"^reference: [\d.]+ clips/s$", said, re.M)
    assert (output / "curves.png").stat().st_size > 10_000
