"""Videos made small and easy to read: H.264 of a short side of 256, or folders of images.

What a file of SOURCE becomes is decided by what decord's reader would give of it: the picture as it
is stored, turned upright, all frames at their times, without sound. Pixels that are not square stay
so, and the file says it. Colours are coded by BT.601 in the narrow range, whatever the size:
programs that do not read in the file which it is take that for granted.

The encoder's settings were measured on two clips of 340 x 256 (23 November 2026, one core, PyAV
17.1). A keyframe every 32 frames makes files 4 to 12 % larger than one every 250, and decoding 32
of 64 frames from anywhere takes a quarter to a half less time; one every 12 costs 7 to 20 % more
and gains nothing. `veryfast` took less than half the time of `medium` and made smaller files.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import av
from filelock import FileLock, Timeout
from tqdm import tqdm

from model.weights.files import sync_folder
from train.lists import find_videos
from train.partial import write_text
from train.prepare.found import FRAME_NAME, survey
from train.prepare.upright import Origin, read_upright
from train.prepare.workers import Died, each
from train.video import VideoError, check_file

_PARTIAL = ".partial-"
# FFmpeg's numbers (AVCOL_SPC_SMPTE170M, AVCOL_RANGE_MPEG) for BT.601 and luma from 16 to 235.
_BT601, _NARROW = 6, 1
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
        if self.fps is not None and not 0.001 <= self.fps <= 1000:
            raise ValueError(f"the frame rate must be from 0.001 to 1000, got {self.fps}")


@dataclass
class Outcome:
    """How many videos were written and how many were there, and path and reason of broken ones."""

    written: int = 0
    kept: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


def reencode(source: Path, target: Path, settings: Settings, workers: int) -> Outcome:
    """Write each video below `source` to the same place below `target`; what came of it.

    What is there is complete, and left alone unless its source is newer. Broken videos are named in
    `target/broken.txt`.

    Raises:
        ListError: `source` is no folder.
        ValueError: two videos would become one file, `target` lies in `source` or has videos of
            other settings or origin, or another process writes there.
        RuntimeError: a result cannot be written.
    """
    found = survey(source)
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies in {source}, whose videos are read: choose another folder")
    plan = plan_targets(list(found.frames), settings)
    target.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(broken=list(found.skipped))
    try:
        with FileLock(target / ".reencode.lock", timeout=0):
            _claim(target, plan, settings)
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
    for result, name in sources.items():
        for above in map(str, Path(result).parents):
            if above in sources:
                raise ValueError(
                    f"{sources[above]} would become {above}, which must be a folder for {name}: "
                    f"rename one"
                )
    return plan


def _claim(target: Path, plan: dict[str, str], settings: Settings) -> None:
    """Make `target` a folder of `settings`, and rid it of what a killed run left half done."""
    path, text = target / "reencode.json", json.dumps(asdict(settings)) + "\n"
    if path.exists():
        said = path.read_text(encoding="utf-8", errors="replace")
        if said != text:
            raise ValueError(
                f"{target} has videos of other settings, {said.strip() or 'which none knows'}: "
                f"choose another folder, or remove it"
            )
    elif any(find_videos(target)) or any((target / result).exists() for result in plan.values()):
        raise ValueError(f"{target} has videos of another origin: choose another folder")
    write_text(path, text)
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
        if not _is_done(source / name, target / result)
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
            write_text(target / "broken.txt", text)
        else:
            (target / "broken.txt").unlink(missing_ok=True)


def _is_done(source: Path, result: Path) -> bool:
    """Whether `result` is there and no older than its source."""
    try:
        return result.exists() and result.stat().st_mtime_ns >= source.stat().st_mtime_ns
    except OSError:
        return False


def _convert(job: tuple[str, Path, Path, Path, Settings]) -> str | None:
    """Why a video cannot be converted, None if it was; RuntimeError if nothing can be written."""
    _, source, target, partial, settings = job
    try:
        # What is there is of an older source.
        _remove(target)
        check_file(str(source))
        (_write_images if settings.has_images else _write_video)(source, partial, settings)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(target)
        return None
    except VideoError as error:
        reason = error.reason
    except OSError as error:
        # What cannot be read is broken, above; this is about the disk written to, and all videos.
        raise RuntimeError(f"cannot write {target}: {error.strerror or error}") from error
    except av.FFmpegError as error:
        reason = f"it cannot be encoded: {error.strerror}"
    # Before the next one: broken videos could be long, and many.
    _remove(partial)
    return reason


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_video(source: Path, path: Path, settings: Settings) -> None:
    """Encode the frames of `source` as an mp4 file that is safe on disk."""
    # The index first: whoever opens the file then reads its beginning alone. And an absolute path,
    # or FFmpeg would take what stands before a colon for a protocol.
    path = os.path.abspath(path)
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
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
        raise VideoError(str(source), f"the encoder made {packets} frames of its {frames}")
    _sync(path)


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
    # Colours mean what they did; `read_upright` brought the values into this coding.
    context.colorspace, context.color_range = _BT601, _NARROW
    context.color_primaries, context.color_trc = origin.primaries, origin.transfer
    return stream


def _write_images(source: Path, folder: Path, settings: Settings) -> None:
    """Write the frames of `source` as numbered JPEG images into a new folder."""
    folder.mkdir()
    for number, (frame, _) in enumerate(
        read_upright(source, settings.short_side, settings.fps, "rgb24"), start=1
    ):
        # Into memory first: Pillow does not notice that a full disk took a part only.
        content = io.BytesIO()
        frame.to_image().save(content, "JPEG", quality=95)
        (folder / FRAME_NAME.format(number)).write_bytes(content.getbuffer())
    for path in folder.iterdir():
        _sync(path)
    sync_folder(folder)


def _sync(path: Path | str) -> None:
    """Make a file safe on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
