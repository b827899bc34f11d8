"""Checkpoints: whole or not at all, and refused in one sentence when they are neither."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from model.weights.files import FORMAT, write_atomically
from train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

STATE = {
    "model": {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([0.1])},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    "recipe": {"data": {"root": "somewhere", "area": [0.1, 1.0]}},
    "step": 7,
    "best_top1": 0.25,
    "broken": {"a b.mp4": "the file is empty"},
    "classes": ["left", "right"],
    "videos": "a digest",
    "scaler": {},
    "skipped": 1,
    "tested": 6,
    "test_videos": "another",
}


class Intruder:
    """Unpickling one makes a folder: what a hostile file could do is anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


class Dying(RuntimeError):
    """Stands for the machine going down."""


def refusal(path: Path) -> str:
    """The reason for which `path` is refused, checked to be one sentence with the path."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"cannot load {path}: ")
    assert "\n" not in message
    return message.removeprefix(f"cannot load {path}: ")


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "new folder" / "last.pt"
    save_checkpoint(path, STATE)
    return path


def test_what_was_saved_is_loaded(saved):
    state = load_checkpoint(saved)
    assert state.pop("format") == FORMAT
    for name, tensor in STATE["model"].items():
        assert torch.equal(state["model"][name], tensor)
    assert torch.equal(state["optimizer"]["state"][0]["step"], torch.tensor(3.0))
    for key in ("recipe", "step", "best_top1", "broken", "classes", "videos"):
        assert state[key] == STATE[key]
    assert state.keys() == STATE.keys()
    assert os.listdir(saved.parent) == ["last.pt"]


def test_a_checkpoint_without_something_is_refused_by_its_name(saved):
    save_checkpoint(saved, {key: value for key, value in STATE.items() if key != "classes"})
    assert refusal(saved) == "it has no classes"


def test_a_write_that_dies_half_way_leaves_the_old_checkpoint(saved):
    before = saved.read_bytes()

    def write(file):
        file.write(before[: len(before) // 2])
        file.flush()
        raise Dying

    with pytest.raises(Dying):
        write_atomically(saved, write)
    assert saved.read_bytes() == before
    assert load_checkpoint(saved)["step"] == 7


def test_what_a_dead_write_left_is_overwritten(saved):
    partial = saved.with_name("last.pt.partial")
    partial.write_bytes(b"half a checkpoint, and longer than the next one" * 1000)
    save_checkpoint(saved, {**STATE, "step": 8})
    assert load_checkpoint(saved)["step"] == 8
    assert not partial.exists()


def test_a_file_is_whole_and_on_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    path, partial = tmp_path / "last.pt", tmp_path / "last.pt.partial"
    path.write_bytes(b"old")
    seen = []

    def watch(name):
        real = getattr(os, name)

        def watched(*arguments):
            whole = partial.read_bytes() if partial.exists() else b""
            seen.append((name, whole, path.read_bytes()))
            return real(*arguments)

        monkeypatch.setattr(os, name, watched)

    watch("fsync")
    watch("replace")
    write_atomically(path, lambda file: file.write(b"new"))
    # Last the folder, or a power cut could bring the old name back.
    assert [name for name, *_ in seen] == ["fsync", "replace", "fsync"]
    assert [bytes for _, *bytes in seen] == [[b"new", b"old"], [b"new", b"old"], [b"", b"new"]]
    assert path.read_bytes() == b"new"


def test_a_missing_checkpoint_is_refused(tmp_path):
    assert refusal(tmp_path / "none.pt") == "no such file"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    assert refusal(saved).startswith("not a checkpoint, or damaged")


def test_a_text_file_is_refused(tmp_path):
    path = tmp_path / "notes.pt"
    path.write_text("not a checkpoint\n" * 100)
    assert refusal(path).startswith("not a checkpoint, or damaged")


@pytest.mark.parametrize(
    "foreign",
    [
        {"state_dict": {"weight": torch.zeros(2)}, "meta": {"epoch": 3}},
        {"format": "videoswin-kernels/0", "step": 1},
        [torch.zeros(2)],
        torch.zeros(2),
    ],
    ids=["upstream", "another format", "list", "tensor"],
)
def test_a_file_of_another_program_is_refused(tmp_path, foreign):
    path = tmp_path / "foreign.pt"
    torch.save(foreign, path)
    assert refusal(path) == "expected a file written by `python -m train`"


@pytest.mark.parametrize("is_bare", [False, True], ids=["torch.save", "pickle"])
def test_code_in_a_file_does_not_run(tmp_path, is_bare):
    path, folder = tmp_path / "hostile.pt", tmp_path / "made by the file"
    state = {"format": FORMAT, "step": Intruder(folder)}
    if is_bare:
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path)
    assert refusal(path).startswith("not a checkpoint, or damaged")
    assert not folder.exists()
    # The intruder is real: a careless reader would have run it.
    pickle.loads(path.read_bytes()) if is_bare else torch.load(path, weights_only=False)
    assert folder.is_dir()
