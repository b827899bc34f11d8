"""A folder of features: one file a video, and the settings that all of them were made with."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model.weights.files import write_atomically
from train.given import Given

SETTINGS = "settings.json"


class FeatureError(RuntimeError):
    """Features that cannot be made, or not into this folder: one sentence with the cure."""


@dataclass(frozen=True)
class FeatureSettings:
    """What decides the numbers in a folder, and what its files are.

    Attributes:
        checkpoint_sha256: digest of the file of the model, in hex.
        model: its name.
        clip_len: frames per clip.
        interval: source frames from one frame of a clip to the next.
        stride: source frames from the beginning of one clip to that of the next.
        kind: "pooled" is the mean over the token grid, "dense" all of it.
        crops: 1 the centre of the frames, 3 the mean over both ends and the centre.
        short_side: height or width, whichever is less, after the resize, in pixels.
        crop: height and width of the crops, in pixels; 0 leaves the frames whole.
        reader: what decodes.
        precision: dtype that the model is autocast to.
        dtype: what is stored.
        format: what the files are.
    """

    checkpoint_sha256: str
    model: str
    clip_len: int
    interval: int
    stride: int
    kind: Literal["pooled", "dense"]
    crops: int
    short_side: int
    crop: int
    reader: str
    precision: str
    dtype: Literal["float32", "float16"]
    format: Literal["npy", "safetensors"]


@dataclass(frozen=True)
class Features:
    """The features of a video.

    Attributes:
        features: pooled [clips, C], dense [clips, C, D, H, W], of the dtype that is stored.
        starts: int64 [clips], the first frame of each clip.
        num_frames, fps: of the video, fps 0 where the file does not tell.
    """

    features: Tensor
    starts: np.ndarray
    num_frames: int
    fps: float


def claim(folder: Path, settings: FeatureSettings, shard: tuple[int, int]) -> None:
    """Puts the settings into a folder, or finds them there.

    Raises:
        FeatureError: others are there, or what is no settings.
        OSError: the folder cannot be written.
    """
    path, ours = folder / SETTINGS, asdict(settings)
    try:
        theirs = json.loads(path.read_text())
    except FileNotFoundError:
        # Of several processes each writes a file of its own; which gets the name is all the same.
        own = folder / f"settings.{shard[0]}-of-{shard[1]}.json"
        text = json.dumps(ours, indent=2) + "\n"
        write_atomically(own, lambda file: file.write(text.encode()))
        os.replace(own, path)
        return
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise FeatureError(f"{path}: must be the settings of features; choose another --output")
    if theirs != ours:
        names = [*ours, *sorted(theirs.keys() - ours.keys())]
        changed = [n for n in names if ours.get(n) != theirs.get(n)]
        said = "; ".join(f"{n}: {theirs.get(n)!r} -> {ours.get(n)!r}" for n in changed)
        raise FeatureError(
            f"{folder}: has features of other settings, {said}: choose another --output"
        )


def target(folder: Path, video: Given, settings: FeatureSettings) -> Path:
    """The file of a video; the name keeps the video's suffix, as a.mp4 and a.avi are two."""
    return folder / f"{video.name}.{settings.format}"


def is_complete(path: Path, video: Given) -> bool:
    """Whether a file of `write` is there, of a video that has as many bytes as this one now."""
    try:
        size = os.stat(video.path).st_size
    except OSError:
        # Without its video a file is as good as it was.
        size = None
    notes = _notes(path)
    return notes is not None and size in (None, int(notes["bytes"]))


def _notes(path: Path) -> dict[str, Any] | None:
    """What is noted of a video, None where no whole file is."""
    try:
        if path.suffix == ".npy":
            notes = json.loads(_beside(path).read_text()) if path.is_file() else None
        else:
            with safe_open(path, "pt") as file:
                notes = file.metadata()
    except (OSError, SafetensorError, ValueError):
        return None
    return notes if isinstance(notes, dict) and str(notes.get("bytes")).isdecimal() else None


def write(path: Path, video: Given, found: Features) -> None:
    """Writes the features of a video, the file itself last and whole; raises OSError.

    A safetensors file has `features` and `starts`, and the rest as metadata. Of an npy file, which
    has the features alone, `starts` and the rest are in a JSON file beside it.
    """
    notes = {
        "video": video.path,
        "bytes": os.stat(video.path).st_size,
        "num_frames": found.num_frames,
        "fps": found.fps,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        # The features of what this path was before must not seem to be of this video.
        path.unlink(missing_ok=True)
        text = json.dumps({**notes, "starts": found.starts.tolist()}) + "\n"
        write_atomically(_beside(path), lambda file: file.write(text.encode()))
        write_atomically(path, lambda file: np.save(file, found.features.numpy()))
        return
    words = {name: str(value).encode(errors="replace").decode() for name, value in notes.items()}
    tensors = {"features": found.features, "starts": torch.from_numpy(found.starts)}
    data = save(tensors, words)
    write_atomically(path, lambda file: file.write(data))


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
