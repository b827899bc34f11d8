"""Videos made small and easy to read: H.264 of a short side of 256, or folders of images.

What a file of SOURCE becomes is decided by what decord's reader would give of it: the picture as it
is stored, turned upright, all frames at their times, without sound. Pixels that are not square stay
so, and the file says it.

The encoder's settings were measured on two clips of 340 x 256 (23 November 2026, one core, PyAV
17.1). A keyframe every 32 frames makes files 4 to 12 % larger than one every 250, and decoding 32
of 64 frames from anywhere takes a quarter to a half less time; one every 12 costs 7 to 20 % more
and gains nothing. `veryfast` took less than half the time of `medium` and made smaller files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from tqdm import tqdm

from train.prepare.found import find
from train.prepare.upright import BrokenError, Origin, read_upright
from train.prepare.workers import Died, each
from train.video import declared_bytes

if TYPE_CHECKING:
    import av

FRAME_NAME = "img_{:05}.jpg"
_PARTIAL = ".partial-"
# FFmpeg's number (AVCOL_RANGE_MPEG) for luma from 16 to 235.
_NARROW = 1
_ENCODER = {"preset": "veryfast", "crf": "20", "g": "32", "threads": "1"}


@dataclass(frozen=True)
class Settings:
    """What becomes of a video.

    Attributes:
        short_side: height or width, whichever is less, at most; pixels, even.
        fps: frames/s of the result, each the nearest in time; None keeps all frames and times.
        has_images: whether it becomes a folder of JPEG images instead of an mp4 file.
    """

    short_side: int = 256
    fps: float | None = None
    has_images: bool = False

    def __post_init__(self) -> None:
        if self.short_side < 16 or self.short_side % 2:
            raise ValueError(f"the short side must be even and 16 or more, got {self.short_side}")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"the frame rate must be above 0 and at most 1000, got {self.fps}")


@dataclass
class Outcome:
    """How many videos were written and how many were there, and path and reason of broken ones."""

    written: int = 0
    kept: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


def reencode(source: Path, target: Path, settings: Settings, workers: int) -> Outcome:
    """Write each video below `source` to the same place below `target`; what came of it.

    What is there is complete and left alone. Broken videos are named in `target/broken.txt`.

    Raises:
        ListError: `source` is no folder.
        ValueError: two videos would become one file, `target` lies in `source` or has videos of
            other settings, or another process writes there.
        RuntimeError: a result cannot be written.
    """
    found = find(source)
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies in {source}, whose videos are read: choose another folder")
    plan = plan_targets(list(found.frames), settings)
    target.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(broken=list(found.skipped))
    try:
        with FileLock(target / ".reencode.lock", timeout=0):
            _claim(target, settings)
            _write_all(source, target, plan, settings, workers, outcome)
    except Timeout:
        raise ValueError(
            f"{target}: another process writes there; wait until it has ended"
        ) from None
    return outcome


def plan_targets(names: list[str], settings: Settings) -> dict[str, str]:
    """The path that each video's result has, both relative; raises ValueError if two have one."""
    plan: dict[str, str] = {}
    sources: dict[str, str] = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        plan[name] = stem if settings.has_images else f"{stem}.mp4"
        other = sources.setdefault(plan[name], name)
        if other != name:
            raise ValueError(f"{other} and {name} would both become {plan[name]}: rename one")
    for result, name in sources.items() if settings.has_images else ():
        for above in map(str, Path(result).parents):
            if above in sources:
                raise ValueError(
                    f"{sources[above]} would become the folder that {name} lies in: rename one"
                )
    return plan


def _claim(target: Path, settings: Settings) -> None:
    """Make `target` a folder of `settings`, and rid it of what a killed run left half done."""
    path = target / "reencode.json"
    if path.exists() and json.loads(path.read_text()) != asdict(settings):
        raise ValueError(
            f"{target} has videos of other settings, {path.read_text().strip()}: choose another "
            f"folder, or remove it"
        )
    _write_text(path, json.dumps(asdict(settings)) + "\n")
    for left in target.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left)


def _write_all(
    source: Path,
    target: Path,
    plan: dict[str, str],
    settings: Settings,
    workers: int,
    outcome: Outcome,
) -> None:
    # A name of this run alone: a worker that outlived a killed run can then rename nothing of ours.
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=target))
    jobs = [
        (name, source / name, target / result, partial / f"{number}{Path(result).suffix}", settings)
        for number, (name, result) in enumerate(plan.items())
        if not (target / result).exists()
    ]
    outcome.kept = len(plan) - len(jobs)
    try:
        bar = tqdm(each(_convert, jobs, workers), "re-encoded", len(jobs), unit="video")
        for job, reason in bar:
            if isinstance(reason, Died):
                reason = reason.reason
            if reason is None:
                outcome.written += 1
            else:
                outcome.broken.append((job[0], reason))
                bar.set_postfix(broken=len(outcome.broken))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        outcome.broken.sort()
        text = "".join(f"{name}\t{reason}\n" for name, reason in outcome.broken)
        if text:
            _write_text(target / "broken.txt", text)
        else:
            (target / "broken.txt").unlink(missing_ok=True)


def _convert(job: tuple[str, Path, Path, Path, Settings]) -> str | None:
    """Why a video cannot be converted, None if it was; RuntimeError if nothing can be written."""
    import av

    _, source, target, partial, settings = job
    try:
        if reason := _why_not_whole(source):
            return reason
        (_write_images if settings.has_images else _write_video)(source, partial, settings)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(target)
        return None
    except BrokenError as error:
        reason = str(error)
    except OSError as error:
        # What cannot be read is broken, above; this is about the disk written to, and all videos.
        raise RuntimeError(f"cannot write {target}: {error.strerror or error}") from error
    except av.FFmpegError as error:
        reason = f"it cannot be encoded: {error.strerror}"
    # Before the next one: broken videos could be long, and many.
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)
    return reason


def _why_not_whole(source: Path) -> str | None:
    """Why a file cannot be a whole video, as far as its size says."""
    try:
        with open(source, "rb") as file:
            size, declared = file.seek(0, os.SEEK_END), declared_bytes(file)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if not size:
        return "the file is empty"
    if size < declared:
        return f"the file is truncated, {size} of {declared} bytes are there"
    return None


def _write_video(source: Path, path: Path, settings: Settings) -> None:
    """Encode the frames of `source` as an mp4 file that is safe on disk."""
    import av

    # The index first: whoever opens the file then reads its beginning alone.
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream, frames, packets = None, 0, 0
        for frame, origin in read_upright(source, settings.short_side, settings.fps, "yuv420p"):
            if stream is None:
                stream = _add_stream(container, frame, origin)
            # Else the encoder would repeat the source's choice of keyframes.
            frame.pict_type = av.video.frame.PictureType.NONE
            frames += 1
            packets += _mux(container, stream.encode(frame))
        packets += _mux(container, stream.encode())
    if packets != frames:
        raise BrokenError(f"the encoder made {packets} frames of its {frames}")
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _mux(container: av.container.OutputContainer, packets: list[av.Packet]) -> int:
    packets = [packet for packet in packets if packet.size]
    container.mux(packets)
    return len(packets)


def _add_stream(
    container: av.container.OutputContainer, frame: av.VideoFrame, origin: Origin
) -> av.VideoStream:
    """The stream that frames like the first one are encoded into."""
    stream = container.add_stream("libx264", rate=origin.rate, options=_ENCODER)
    stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv420p"
    context = stream.codec_context
    context.time_base = origin.time_base
    if origin.pixel_aspect:
        context.sample_aspect_ratio = origin.pixel_aspect
    # Colours mean what they did; the values were brought into the narrow range.
    context.colorspace, context.color_range = frame.colorspace, _NARROW
    context.color_primaries, context.color_trc = origin.primaries, origin.transfer
    return stream


def _write_images(source: Path, folder: Path, settings: Settings) -> None:
    """Write the frames of `source` as numbered JPEG images into a new folder."""
    folder.mkdir()
    for number, (frame, _) in enumerate(
        read_upright(source, settings.short_side, settings.fps, "rgb24"), start=1
    ):
        frame.to_image().save(folder / FRAME_NAME.format(number), quality=95)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
