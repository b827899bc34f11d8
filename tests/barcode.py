"""Videos whose frames carry their number, so that a test can tell which frame it was given."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from train.video import Video

HEIGHT, WIDTH = 64, 96
FRAMES = 60
BITS = 12
CLOCK = 600  # ticks a second, of videos with irregular times

# What the tests write: keyframes are far apart, so that going to one matters.
KINDS = {
    "h264.mp4": {"g": "25", "bf": "3"},
    "fragmented.mp4": {"movflags": "frag_keyframe+empty_moov", "g": "25", "bf": "3"},
    "variable.mp4": {"g": "25", "bf": "3", "variable": True},
    "variable.mkv": {"g": "25", "bf": "3", "variable": True},
    "h264.mkv": {"g": "25", "bf": "2"},
    "hevc.mp4": {"codec": "libx265", "g": "25", "x265-params": "log-level=none:open-gop=0"},
    "hevc_open.mp4": {"codec": "libx265", "g": "25", "x265-params": "log-level=none:open-gop=1"},
    "open.mp4": {"g": "12", "bf": "3", "x264-params": "open-gop=1"},
    "refresh.mp4": {"g": "20", "x264-params": "intra-refresh=1"},
    "plain.avi": {"codec": "mpeg4", "g": "25"},
    "mpeg4.avi": {"codec": "mpeg4", "g": "25", "bf": "2"},
    "h264.avi": {"g": "25", "bf": "3"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "25", "deadline": "realtime", "cpu-used": "8"},
    "vp8.webm": {
        "codec": "libvpx",
        "g": "25",
        "b": "2000k",
        "auto-alt-ref": "1",
        "lag-in-frames": "12",
        "deadline": "good",
        "cpu-used": "4",
    },
    "h264.ts": {"g": "25", "bf": "3"},
    "mpeg1.mpg": {"codec": "mpeg1video", "g": "25", "bf": "2", "b": "4000k"},
    "elementary.h264": {"g": "25", "bf": "3"},
}


def picture_of(number: int) -> np.ndarray:
    """Return frame `number`, uint8 [64, 96, 3]: its bits in two rows of blocks, gradients below."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    blocks = np.array(bits, dtype=np.uint8).reshape(2, BITS // 2) * 255
    y, x = np.mgrid[: HEIGHT // 2, :WIDTH]
    gradient = np.stack([2 * x, 4 * y + 2 * number % 100, 255 - 2 * x], axis=-1) % 256
    above = np.repeat(blocks.repeat(16, axis=0).repeat(16, axis=1)[..., None], 3, axis=-1)
    return np.concatenate([above, gradient.astype(np.uint8)])


def number_of(frame: torch.Tensor) -> int:
    """Return the number that a frame carries, uint8 [3, 64, 96]; it must be black and white."""
    middles = frame[:, 8:32:16, 8::16].float().mean(dim=0).flatten()
    assert ((middles < 80) | (middles > 175)).all(), f"no bar code: {middles.tolist()}"
    return sum(1 << bit for bit, value in enumerate(middles.tolist()) if value > 128)


def numbers_of(frames: torch.Tensor) -> list[int]:
    """Return the numbers that frames carry, uint8 [T, 3, 64, 96]."""
    return list(map(number_of, frames))


def times_of(frames: int) -> np.ndarray:
    """Return irregular times of frames, ascending, in ticks of `CLOCK`."""
    return np.cumsum(np.random.default_rng(0).integers(5, 60, size=frames))


def write_video(
    path: Path,
    frames: int = 60,
    *,
    codec: str = "libx264",
    movflags: str | None = None,
    variable: bool = False,
    **options: str,
) -> Path:
    """Encode frames 0, 1, 2 ... into `path`, its ending chooses the container; return `path`."""
    import av

    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"threads": "1", **options}
        if variable:
            stream.codec_context.time_base = Fraction(1, CLOCK)
        for number, time in enumerate(times_of(frames)):
            frame = av.VideoFrame.from_ndarray(picture_of(number), format="rgb24")
            if variable:
                frame.pts, frame.time_base = int(time), Fraction(1, CLOCK)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def patterns(count: int, seed: int) -> list[list[int]]:
    """Ways to read a video: at random, sorted, repeated, backwards, single and strided."""
    generator = np.random.default_rng(seed)
    drawn = []
    for number in range(count):
        some = generator.integers(FRAMES, size=generator.integers(2, 6))
        start, step = generator.integers(FRAMES // 2), generator.integers(1, 12)
        drawn.append(
            [
                some,
                np.sort(some),
                np.repeat(some, 2),
                np.sort(some)[::-1],
                some[:1],
                np.arange(start, FRAMES, step),
            ][number % 6].tolist()
        )
    return drawn


def check_patterns(video: Video, count: int) -> None:
    """Assert that `video` gives the frames of so many patterns of access, and no others."""
    assert video.num_frames == FRAMES
    for indices in patterns(count, seed=count):
        frames = video.read(indices)
        assert frames.dtype == torch.uint8
        assert frames.shape == (len(indices), 3, HEIGHT, WIDTH)
        assert numbers_of(frames) == indices
