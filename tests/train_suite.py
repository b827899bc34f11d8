"""A training run small enough for tests: its videos, its recipe, and ways to start it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import dataloader

pytest.importorskip("av")
pytest.importorskip("decord")
pytest.importorskip("tyro")

from train import data, evaluate, predict
from train.__main__ import main as train_main
from train.data import DataSettings
from train.optim import OptimSettings
from train.recipe import LoopSettings, ModelSettings, Recipe, differences
from train.recipes import RECIPES
from train.synthetic import write_dataset

ROOT = Path(__file__).parents[1]
# Where and how, the same on every machine; pooling would outlive the test in this process.
MACHINE = ["--device", "cpu", "--allocator", "default"]


def write_videos(folder: Path) -> None:
    """16 training videos and 8 test videos, and lists that also name four files that are none."""
    sizes = {"frames": 8, "width": 64, "height": 32}
    write_dataset(folder, videos_per_class=2, test_videos_per_class=1, workers=1, **sizes)
    whole = (folder / "train" / "left" / "00000.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.mp4").write_text("no video\n")
    (folder / "empty.mp4").write_bytes(b"")
    lines = "".join(f"{name} {label}\n" for label, name in enumerate(BROKEN))
    for split in ("train", "test"):
        intact = (folder / f"{split}.txt").read_text()
        (folder / f"{split}_broken.txt").write_text(intact + lines)


BROKEN = ("cut.mp4", "notes.mp4", "empty.mp4", "no such file.mp4")


def tiny_recipe(folder: Path) -> Recipe:
    """6 steps an epoch, the last of one clip; 12 in all, with a checkpoint after 4, 6, 8, 12.

    Dropout and stochastic depth are on: what they draw must survive an interruption.
    """
    return Recipe(
        model=ModelSettings(name="swin_nano", drop_path_rate=0.2, dropout=0.5),
        data=DataSettings(
            root=str(folder),
            clip_len=4,
            interval=1,
            short_side=32,
            crop=16,
            test_clips=1,
            test_crops=1,
            test_short_side=16,
            val_short_side=16,
            workers=0,
        ),
        optim=OptimSettings(lr=1e-3, warmup_epochs=1),
        loop=LoopSettings(
            epochs=2,
            batch_size=3,
            test_batch_size=3,
            evaluate_every=1,
            report_every=1,
            checkpoint_every=4,
            seed=5,
        ),
    )


def changed(recipe: Recipe, **parts: dict) -> Recipe:
    """The recipe with some fields of some parts changed."""
    return replace(
        recipe, **{part: replace(getattr(recipe, part), **values) for part, values in parts.items()}
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(recipe: Recipe, output: Path, *words: str) -> int:
    """The exit status of `python -m train` with a recipe of ours, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "tiny", recipe)
        return train_main(["--recipe", "tiny", "--output", str(output), *MACHINE, *words])


@one_thread()
def run_evaluate(checkpoint: Path, *words: str) -> int:
    return evaluate.main(["--checkpoint", str(checkpoint), *MACHINE, *words])


@one_thread()
def run_predict(checkpoint: Path, *videos: Path | str) -> int:
    return predict.main([*map(str, videos), "--checkpoint", str(checkpoint), *MACHINE])


def overrides(recipe: Recipe) -> list[str]:
    """The words that make a recipe of the demo's."""
    words = []
    for difference in differences(RECIPES["demo"], recipe):
        name = difference.partition(":")[0]
        part, _, field = name.partition(".")
        value = getattr(getattr(recipe, part), field)
        if isinstance(value, bool):
            words.append(f"--{part}.{'' if value else 'no-'}{field}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def signalled_train(
    recipe: Recipe, output: Path, step: int, kind: str, *words: str
) -> subprocess.CompletedProcess:
    """`python -m train` in a process group that gets a signal after so many steps."""
    program = f"""
import os, runpy, signal, sys
from train import loop
plain = loop.Run._step
def step(self, *arguments):
    if self.step == {step}:
        os.killpg(0, signal.{kind})
    return plain(self, *arguments)
loop.Run._step = step
sys.argv[0] = "train"
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""
    machine = ["--recipe", "demo", "--output", str(output), "--device", "cpu", *words]
    return subprocess.run(
        [sys.executable, "-c", program, *machine, *overrides(recipe)],
        cwd=ROOT,
        # As in this process: the order of sums may depend on it.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A data set of its own for each file of tests: some write more lists into it."""
    folder = tmp_path_factory.mktemp("data") / "videos"
    write_videos(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(videos) -> Recipe:
    return tiny_recipe(videos)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert train(recipe, output) == 0
    return output


@pytest.fixture
def prompt(monkeypatch):
    """A dead data worker is found after a fifth of a second, in place of five."""
    plain = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(plain, "__defaults__", (0.2,))
    monkeypatch.setattr(data, "_SECONDS_BETWEEN_LOOKS", 0.2)


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other, where: str = "") -> None:
    """Compare nested states bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert one == other, where
