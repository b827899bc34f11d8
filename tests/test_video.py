"""Reading intact videos with decord, and refusing others: quickly and in one sentence.

What all readers have in common is asked in test_readers.py.
"""

import faulthandler
import gc
import io
import multiprocessing
import os
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pytest.importorskip("decord")

from train.video import Video, VideoError, declared_bytes, open_video  # noqa: E402

FRAMES = 48


def write_video(path: Path, pictures, codec="libx264", pixels="yuv420p", movflags=None, **options):
    """Encode `pictures`, uint8 [H, W, 3] each, into `path`."""
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.options = options
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def grey(value: int) -> np.ndarray:
    return np.full((48, 64, 3), value, dtype=np.uint8)


def noise() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return list(generator.integers(256, size=(FRAMES, 48, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """A video of which frame i has the brightness 5 i, with keyframes every 12 frames."""
    path = tmp_path_factory.mktemp("video") / "numbered.mp4"
    return write_video(path, [grey(5 * i) for i in range(FRAMES)], g="12", bf="3")


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> dict[str, bytes]:
    """Intact files of noise in several containers; noise, so that the data fill most of a file."""
    folder = tmp_path_factory.mktemp("intact")
    kinds = {
        "index_first.mp4": {"movflags": "faststart", "g": "12"},
        "index_last.mp4": {"g": "12"},
        "fragmented.mp4": {"movflags": "frag_keyframe+empty_moov", "g": "12"},
        "plain.mkv": {},
        "plain.avi": {"codec": "mpeg4"},
    }
    pictures = noise()
    return {
        name: write_video(folder / name, pictures, **kind).read_bytes()
        for name, kind in kinds.items()
    }


def read_all(path: Path, indices=None) -> torch.Tensor:
    video = open_video(path)
    return video.read(range(video.num_frames) if indices is None else indices)


def refusal(path: Path, indices=None) -> str:
    """Return the message of the VideoError that opening and reading `path` ends in, in time."""
    start = time.monotonic()
    with pytest.raises(VideoError) as caught:
        read_all(path, indices)
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert message == f"cannot read {path}: {caught.value.reason}"
    assert "\n" not in message
    # Nothing of decord's C++ may reach the user, by way of the chain of exceptions either.
    assert ".cc:" not in "".join(traceback.format_exception(caught.value))
    return caught.value.reason


def test_frames_are_the_ones_asked_for(numbered):
    video = open_video(numbered)
    assert video.num_frames == FRAMES
    assert video.fps == pytest.approx(24)
    indices = [47, 0, 13, 13, 46, 12, 11, 30, 0, 47, 29]
    frames = video.read(indices)
    assert frames.dtype == torch.uint8
    assert frames.shape == (len(indices), 3, 48, 64)
    read = frames.float().mean(dim=(1, 2, 3)).div(5).round().int()
    assert read.tolist() == indices


def test_every_frame_can_be_read_alone_and_after_another(numbered):
    video = open_video(numbered)
    for index in np.random.default_rng(0).permutation(FRAMES):
        frame = video.read([int(index)])
        assert round(frame.float().mean().item() / 5) == index


def test_sorted_and_unsorted_reads_agree(numbered):
    video = open_video(numbered)
    order = np.random.default_rng(1).permutation(FRAMES)
    assert torch.equal(video.read(order), video.read(np.arange(FRAMES))[torch.from_numpy(order)])


@pytest.mark.parametrize("channel", [0, 1, 2], ids=["red", "green", "blue"])
def test_channels_are_red_green_blue(tmp_path, channel):
    picture = grey(0)
    picture[..., channel] = 250
    frames = open_video(write_video(tmp_path / "colour.mp4", [picture] * 4)).read([2])
    means = frames.float().mean(dim=(0, 2, 3))
    assert means.argmax() == channel
    assert means[channel] > 200
    assert means.sum() - means[channel] < 60


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("odd.mp4", "libx264", "yuv444p"),
        ("odd.webm", "libvpx-vp9", "yuv420p"),
        ("odd.avi", "mpeg4", "yuv420p"),
    ],
)
def test_odd_sizes_are_read_as_ffmpeg_decodes_them(tmp_path, name, codec, pixels):
    y, x = np.mgrid[:49, :67]
    picture = np.stack([3 * x, 5 * y, 255 - 3 * x], axis=-1).astype(np.uint8)
    path = write_video(tmp_path / name, [picture] * 6, codec, pixels)
    with av.open(str(path)) as container:
        expected = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    frames = open_video(path).read(range(6)).permute(0, 2, 3, 1).numpy()
    assert frames.shape == expected.shape == (6, 49, 67, 3)
    # Two versions of FFmpeg upsample the chroma of 4:2:0 a little differently.
    assert np.abs(frames.astype(int) - expected).max() <= (0 if pixels == "yuv444p" else 16)


def test_intact_containers_are_read(tmp_path, intact):
    for name, data in intact.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert declared_bytes(io.BytesIO(data)) == len(data), name
        video = open_video(path)
        assert video.num_frames == FRAMES, name
        assert video.read([FRAMES - 1, 0]).shape == (2, 3, 48, 64), name


@pytest.mark.parametrize("percent", [10, 50, 90, 99])
@pytest.mark.parametrize(
    "name", ["index_first.mp4", "index_last.mp4", "fragmented.mp4", "plain.mkv", "plain.avi"]
)
def test_truncated_files_are_refused(tmp_path, intact, name, percent):
    path = tmp_path / name
    data = intact[name]
    path.write_bytes(data[: len(data) * percent // 100])
    # Frame 0 is still there: a reader that looked no further would notice nothing.
    assert refusal(path, [0]).startswith("the file is truncated, ")


def test_an_index_that_is_missing_altogether_is_refused(tmp_path, intact):
    data = intact["index_last.mp4"]
    path = tmp_path / "no_index.mp4"
    path.write_bytes(data[: data.rindex(b"moov") - 4])
    assert refusal(path) == "not a video decord can open"


@pytest.mark.parametrize("name", ["index_first.mp4", "index_last.mp4"])
def test_zeroed_data_are_refused(tmp_path, intact, name):
    data = bytearray(intact[name])
    length = len(data) // 4
    data[len(data) // 2 : len(data) // 2 + length] = bytes(length)
    path = tmp_path / name
    path.write_bytes(data)
    assert refusal(path).startswith("decoding failed at or soon after frame ")


def test_a_video_survives_a_failed_read(tmp_path, intact):
    data = bytearray(intact["index_first.mp4"])
    data[-len(data) // 4 :] = bytes(len(data) - len(data) * 3 // 4)
    path = tmp_path / "damaged_end.mp4"
    path.write_bytes(data)
    video = open_video(path)
    with pytest.raises(VideoError, match=r"frame \d+ of 48"):
        video.read([0, 47])
    assert video.read([0, 1]).shape == (2, 3, 48, 64)


def test_a_rotation_is_refused_in_words(tmp_path, numbered):
    data = bytearray(numbered.read_bytes())
    # The matrix of the track header follows its name by 40 bytes; this one turns by 90 degrees.
    start = data.index(b"tkhd") + 44
    matrix = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], dtype=">i4")
    data[start : start + 36] = matrix.tobytes()
    path = tmp_path / "upright.mp4"
    path.write_bytes(data)
    assert "rotation" in refusal(path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text.mp4", b"hello world\n" * 100, "not a video decord can open"),
        ("short.mp4", b"hi", "not a video decord can open"),
        ("box.mp4", b"\x00\x00\x00\x08ftyp", "not a video decord can open"),
        ("empty.mp4", b"", "the file is empty"),
        ("missing.mp4", None, "no such file"),
    ],
)
def test_files_that_are_no_videos_are_refused(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name) == reason


def test_a_directory_is_refused(tmp_path):
    assert refusal(tmp_path) == "it is a directory"


def test_a_file_without_video_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert refusal(path) == "there is no video stream in the file"


@pytest.mark.parametrize("indices", [[], [[0, 1]], [0.5], [-1], [FRAMES]])
def test_wrong_indices_are_the_callers_fault(numbered, indices):
    with pytest.raises(ValueError, match=r"^Video\.read: indices must "):
        open_video(numbered).read(indices)


def mean_of_frame(path: str) -> float:
    return open_video(path).read([20]).float().mean().item()


def free_and_read(videos: list, path: str) -> float:
    videos.clear()
    gc.collect()
    return mean_of_frame(path)


def read_in_child(video: Video) -> str:
    try:
        video.read([0])
    except VideoError as error:
        return error.reason


def answer_of_fork(target, *arguments):
    """Return what `target` returns in a fork of this process; fail, saying how it ended, if not."""
    # Other tests' garbage, which may have threads, is freed here and not there.
    gc.collect()
    context = multiprocessing.get_context("fork")
    near, far = context.Pipe(duplex=False)

    def work():
        faulthandler.dump_traceback_later(50, exit=True)
        far.send(target(*arguments))

    worker = context.Process(target=work, daemon=True)
    worker.start()
    far.close()
    try:
        assert near.poll(60), "no answer in a minute"
        answer = near.recv()
    except EOFError:
        worker.join(timeout=30)
        pytest.fail(f"{target.__name__} ended with {worker.exitcode} and no answer")
    finally:
        worker.join(timeout=30)
        worker.kill()
    assert worker.exitcode == 0
    return answer


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_workers_read_what_they_open(numbered):
    video = open_video(numbered)
    video.read([0])  # decord and its threads are up before the fork
    assert answer_of_fork(mean_of_frame, numbered) == pytest.approx(100, abs=2)
    assert "opened in another process" in answer_of_fork(read_in_child, video)


@fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_workers_do_not_wait_for_their_parents_decoders(numbered, tmp_path):
    # Freeing a reader of the parent joins its threads, which the child does not have.
    videos = [open_video(numbered)]
    assert answer_of_fork(free_and_read, videos, numbered) == pytest.approx(100, abs=2)
    # Frames of an avi with B-frames are counted: the file stays open.
    pictures = [grey(5 * i) for i in range(FRAMES)]
    path = write_video(tmp_path / "counted.avi", pictures, bf="3")
    counted = open_video(path, "pyav", num_threads=4)
    counted.read([0])
    videos = [counted]
    del counted
    assert answer_of_fork(free_and_read, videos, numbered) == pytest.approx(100, abs=2)
