"""Small videos and trees of files that train.prepare is asked about."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from train.prepare.__main__ import main


def prepare(*words) -> int:
    """The exit status of a command; of those with workers, in this process."""
    has_workers = words[0] in ("reencode", "check") and "--workers" not in words
    return main([*map(str, words), *(["--workers", "0"] if has_workers else [])])


def touch(root: Path, *names: str) -> None:
    """Empty files, for what goes by names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def quarters(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture that no turn and no flip leaves as it is, uint8 [H, W, 3]."""
    picture = np.full((height, width, 3), 40, np.uint8)
    picture[: height // 2, : width // 2] = (220, 60, 60)
    picture[height // 2 :, : width // 2] = (60, 200, 60)
    return picture


def greys(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Pictures of which number i has the brightness 20 + 6 i."""
    return [np.full((height, width, 3), 20 + 6 * i, np.uint8) for i in range(count)]


def write_video(
    path: Path,
    pictures=None,
    *,
    codec="libx264",
    pixels="yuv420p",
    times=None,
    sound=False,
    rotation=None,
    matrix=None,
    is_full=False,
    **options,
) -> Path:
    """Encode `pictures`, uint8 [H, W, 3] each, at `times` in ms, else 24 a second.

    The same bytes each time, where Matroska would have identifiers drawn at random.

    `matrix` is FFmpeg's number for the coding of colours, which the file then says.
    """
    pictures = [quarters()] * 12 if pictures is None else pictures
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            stream.codec_context.colorspace = matrix
            stream.codec_context.color_range = 1 + is_full
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        heard = container.add_stream("aac", rate=44100) if sound else None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if matrix is not None:
                # PyAV's numbers are of another list, where BT.601 is 5.
                coding = {1: 1, 6: 5}[matrix]
                frame = frame.reformat(
                    format=pixels, dst_colorspace=coding, dst_color_range=1 + is_full
                )
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if heard is not None:
            silence = np.zeros((1, 22050), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(heard.encode(frame))
            container.mux(heard.encode())
    return path


def decoded(path: Path) -> tuple[np.ndarray, list[Fraction]]:
    """The frames of a video, uint8 [T, H, W, 3], and their times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return pictures, [frame.pts * frame.time_base for frame in frames]


def square_or_end(number: int) -> int:
    """Work for a worker, who dies of 3, fails at 5 and cannot at all at 6."""
    if number == 3:
        os._exit(9)
    if number == 5:
        raise RuntimeError("no room for 5")
    return number**2


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source", tmp_path / "target"


def error_of(capfd, *words) -> str:
    """What a command that is refused says, in one line."""
    assert prepare(*words) == 1
    error = capfd.readouterr().err.strip()
    assert "\n" not in error
    return error
