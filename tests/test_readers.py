"""What every reader of videos must do: give the frames asked for, or say in a sentence why not."""

import gc
import os
import sys
import tarfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

import barcode  # noqa: E402
from barcode import FRAMES, KINDS, check_patterns, numbers_of  # noqa: E402

from train.video import (  # noqa: E402
    READERS,
    Packed,
    ReaderError,
    VideoError,
    open_video,
    why_not,
)

# Intact videos of which a library refuses frames, or gives others, as their readers say.
FAILED = {
    "decord": {
        *("hevc_open.mp4", "open.mp4", "refresh.mp4", "mpeg4.avi", "h264.avi", "mpeg1.mpg"),
        *("h264.ts", "elementary.h264"),
    },
    "pyav": set(),
    "torchcodec": {
        *("refresh.mp4", "mpeg4.avi", "h264.avi", "mpeg1.mpg", "h264.ts", "elementary.h264"),
    },
}
CASES = [(r, k) for r in READERS for k in KINDS if k not in FAILED[r]]


def have(reader: str) -> str:
    """Return `reader`, or skip with the sentence that says why it is not here."""
    if why_not(reader) is not None:
        pytest.skip(why_not(reader))
    return reader


@pytest.fixture(params=READERS)
def reader(request) -> str:
    return have(request.param)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A function from a kind of `barcode.KINDS` to a video of 60 frames, written when asked."""
    folder, written = tmp_path_factory.mktemp("kinds"), {}

    def video(kind: str) -> Path:
        if kind not in written:
            written[kind] = barcode.write_video(folder / kind, FRAMES, **KINDS[kind])
        return written[kind]

    return video


def read(source, reader: str, indices=None) -> torch.Tensor:
    video = open_video(source, reader)
    return video.read(range(video.num_frames) if indices is None else indices)


def refusal(source, reader: str, indices=None) -> str:
    """Return the reason of the VideoError that opening and reading `source` ends in, in time."""
    start = time.monotonic()
    with pytest.raises(VideoError) as caught:
        read(source, reader, indices)
    assert time.monotonic() - start < 5
    name = f"{source.path}:{source.name}" if isinstance(source, Packed) else source
    assert str(caught.value) == f"cannot read {name}: {caught.value.reason}"
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["h264.mp4", "variable.mkv"])
def test_random_access(videos, reader, kind):
    check_patterns(open_video(videos(kind), reader), 200)


@pytest.mark.parametrize(("reader", "kind"), CASES)
def test_every_container(videos, reader, kind):
    check_patterns(open_video(videos(kind), have(reader)), 12)


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "kind"), CASES)
def test_random_access_to_every_container(videos, reader, kind):
    video = open_video(videos(kind), have(reader))
    check_patterns(video, 200)
    for index in range(FRAMES):
        assert numbers_of(video.read([index])) == [index]


@pytest.mark.parametrize("kind", ["h264.mp4", "variable.mp4", "vp9.webm"])
def test_readers_give_the_same_pixels(videos, reader, kind):
    have("decord")
    frames, expected = (open_video(videos(kind), r).read(range(FRAMES)) for r in (reader, "decord"))
    assert torch.equal(frames, expected)


def test_more_threads_give_the_same_frames(videos, reader):
    one, two = (open_video(videos("h264.mp4"), reader, num_threads=n) for n in (1, 2))
    places = [59, 0, 31, 30]
    assert torch.equal(one.read(places), two.read(places))


def test_frame_rates(videos, reader):
    assert open_video(videos("h264.mp4"), reader).fps == pytest.approx(25)
    span = np.ptp(barcode.times_of(FRAMES)) / barcode.CLOCK
    assert open_video(videos("variable.mp4"), reader).fps == pytest.approx(FRAMES / span, rel=0.05)


def test_packed_is_what_the_file_is(tmp_path, videos, reader):
    paths = [videos("h264.mkv"), videos("h264.mp4")]
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for path in paths:
            shard.add(path, path.name)
    with tarfile.open(tmp_path / "shard.tar") as shard:
        members = shard.getmembers()
    for path, member in zip(paths, members, strict=True):
        packed = Packed(str(tmp_path / "shard.tar"), member.name, member.offset_data, member.size)
        video, same = open_video(packed, reader), open_video(path, reader)
        assert video.path == f"{tmp_path / 'shard.tar'}:{path.name}"
        assert (video.num_frames, video.fps) == (same.num_frames, same.fps)
        assert torch.equal(video.read([40, 3, 3]), same.read([40, 3, 3]))


def test_faults_of_shards(tmp_path, videos, reader):
    data = videos("h264.mp4").read_bytes()
    path = tmp_path / "shard.tar"
    path.write_bytes(bytes(512) + data[:-100])
    size = len(data)
    cases = {
        (512, size): f"the shard is too short, {size - 100} of {size} bytes are there",
        (size + 9999, 10): "the shard is too short, 0 of 10 bytes are there",
        (512, size - 200): f"the file is truncated, {size - 200} of {size} bytes are there",
        (512, 0): "the file is empty",
    }
    for (offset, length), reason in cases.items():
        assert refusal(Packed(str(path), "a.mp4", offset, length), reader) == reason
    assert refusal(Packed(str(tmp_path / "b.tar"), "a.mp4", 0, 9), reader) == "no such file"
    assert refusal(Packed(str(tmp_path), "a.mp4", 0, 9), reader) == "it is a directory"
    # Zeros of the header before it.
    assert "not a video" in refusal(Packed(str(path), "a.mp4", 0, 512), reader)


def test_files_that_are_no_videos(tmp_path, videos, reader):
    truncated, text, empty = (tmp_path / f"{name}.mp4" for name in ("truncated", "text", "empty"))
    data = videos("h264.mp4").read_bytes()
    truncated.write_bytes(data[: len(data) * 2 // 3])
    text.write_text("hello world\n" * 100)
    empty.touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "dangling.mp4").symlink_to("nowhere.mp4")
    cases = {
        "missing.mp4": "no such file",
        "dangling.mp4": "no such file",
        "loop.mp4": "too many levels of symbolic links",
        "pipe.mp4": "it is no regular file",
        "empty.mp4": "the file is empty",
        "truncated.mp4": "the file is truncated, ",
        "text.mp4": "not a video ",
        "": "it is a directory",
    }
    for name, reason in cases.items():
        assert refusal(tmp_path / name, reader, [0]).startswith(reason)


def test_sound_is_no_video(tmp_path, reader):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    assert refusal(path, reader) == "there is no video stream in the file"


@pytest.mark.parametrize("kind", ["h264.mp4", "h264.mkv"])
def test_no_frame_is_refused_and_one_is_read(tmp_path, reader, kind):
    path = barcode.write_video(tmp_path / kind, 1, **KINDS[kind])
    video = open_video(path, reader)
    assert video.num_frames == 1
    assert numbers_of(video.read([0, 0])) == [0, 0]
    assert refusal(barcode.write_video(tmp_path / f"none_{kind}", 0, **KINDS[kind]), reader)


def test_names_of_files(tmp_path, videos, reader, monkeypatch):
    data = videos("h264.mp4").read_bytes()
    monkeypatch.chdir(tmp_path)
    names = [
        "wrong ending.avi",
        "no_ending",
        "Tänzer 舞 - 100 % %03d.mp4",
        "http:video.mp4",
        "-v.mp4",
    ]
    for name in names:
        Path(name).write_bytes(data)
    os.symlink(names[0], "link.mp4")
    for name in [*names, "link.mp4", tmp_path / names[0]]:
        assert numbers_of(open_video(name, reader).read([33, 2])) == [33, 2], name


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read(tmp_path, reader):
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "secret.mp4").chmod(0)
    assert refusal(tmp_path / "secret.mp4", reader) == "permission denied"


@pytest.mark.parametrize("reader", ["pyav", "torchcodec"])
def test_damaged_data_are_refused_and_the_rest_is_read(tmp_path, videos, reader):
    """Zeros at the end: what is before them can be read, before and after a failure.

    decord decodes so far ahead that such a small video fails at once; test_video.py asks it.
    """
    have(reader)
    path = tmp_path / "damaged.mp4"
    data = bytearray(videos("h264.mp4").read_bytes())
    end = data.rindex(b"moov") - 4
    data[end - 300 : end] = bytes(300)
    path.write_bytes(data)
    video = open_video(path, reader)
    assert numbers_of(video.read([3, 0])) == [3, 0]
    with pytest.raises(VideoError, match=r"frame \d+ of 60"):
        video.read([0, 59])
    assert numbers_of(video.read([3, 0])) == [3, 0]


def test_a_reader_is_one_of_those_there_are(videos):
    with pytest.raises(ValueError, match=r"must be one of decord, pyav, torchcodec, got 'opencv'"):
        open_video(videos("h264.mp4"), "opencv")


def test_a_reader_that_is_not_here_is_replaced_by_none(videos, monkeypatch):
    libraries = {"decord": "decord", "pyav": "av", "torchcodec": "torchcodec.decoders"}
    for reader, library in libraries.items():
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, f"train.readers.{reader}", raising=False)
            patch.setitem(sys.modules, library, None)
            with pytest.raises(ReaderError, match=r"cannot be used here, .*; pip inst") as caught:
                open_video(videos("h264.mp4"), reader)
        assert not isinstance(caught.value, VideoError)


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_reader_that_fails_as_it_is_loaded_is_not_here(videos, monkeypatch, error):
    """torchcodec 0.7 without FFmpeg, and decord without its own library."""

    class Finder:
        def find_spec(self, name, *_):
            if name == "decord":
                raise error("Could not load it.\nTwenty more lines.")

    for name in [*(n for n in sys.modules if n.split(".")[0] == "decord"), "train.readers.decord"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    wanted = (
        "open_video: reader 'decord' cannot be used here, Could not load it.; pip install decord"
    )
    assert why_not("decord") == wanted
    with pytest.raises(ReaderError):
        open_video(videos("h264.mp4"))


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_a_name_that_is_not_utf8(tmp_path, videos):
    have("decord")
    path = tmp_path / "\udcff.mp4"
    path.write_bytes(videos("h264.mp4").read_bytes())
    assert numbers_of(read(path, "pyav", [7])) == [7]
    with pytest.raises(VideoError) as caught:
        open_video(path, "decord")
    wanted = "decord opens no name that is not UTF-8: rename it, or use reader 'pyav'"
    assert caught.value.reason == wanted


# What only PyAV's reader has to answer for.


def remux(source: Path, path: Path, shift: int) -> Path:
    """Copy a video, its times earlier by `shift` frames; those before 0 are then edited out."""
    options = {"use_editlist": "1", "avoid_negative_ts": "disabled"}
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        ticks = int(shift / (25 * old.streams.video[0].time_base))
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
                packet.stream = stream
                new.mux(packet)
    return path


@pytest.mark.parametrize("cut", [10, 25, 31])
def test_pyav_shows_what_the_edit_list_shows(tmp_path, videos, cut):
    video = open_video(remux(videos("h264.mp4"), tmp_path / "edited.mp4", cut), "pyav")
    assert video.num_frames == FRAMES - cut
    assert numbers_of(video.read(range(FRAMES - cut))) == list(range(cut, FRAMES))
    for index in range(FRAMES - cut):
        assert numbers_of(video.read([index])) == [index + cut]


def test_pyav_reads_a_stream_that_was_entered_late(tmp_path, videos):
    """Nothing before the first key frame can be decoded, so that this has the first number."""
    data = videos("h264.ts").read_bytes()
    path = tmp_path / "late.ts"
    path.write_bytes(data[188 * (len(data) // 188 // 4) :])
    video = open_video(path, "pyav")
    assert numbers_of(video.read(range(video.num_frames))) == list(range(25, FRAMES))


@pytest.mark.parametrize("turns", [0, 1, 2, 3], ids=lambda turns: f"{90 * turns}")
def test_pyav_turns_a_rotated_video_upright(tmp_path, videos, turns):
    data = bytearray(videos("h264.mp4").read_bytes())
    # The matrix of the track header follows its name by 40 bytes; it turns clockwise.
    start = data.index(b"tkhd") + 44
    a, b = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]
    matrix = np.array([a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30], dtype=">i4")
    data[start : start + 36] = matrix.tobytes()
    path = tmp_path / "rotated.mp4"
    path.write_bytes(data)
    plain = open_video(videos("h264.mp4"), "pyav").read([5, 40])
    turned = open_video(path, "pyav").read([5, 40])
    assert torch.equal(turned, torch.rot90(plain, -turns, dims=(2, 3)))


def test_pyav_refuses_frames_of_several_sizes(tmp_path):
    def packets(height: int, width: int, first: int):
        encoder = av.CodecContext.create("libx264", "w")
        encoder.height, encoder.width, encoder.pix_fmt = height, width, "yuv420p"
        encoder.time_base, encoder.options = Fraction(1, 25), {"bf": "0"}
        for number in range(first, first + 5):
            frame = av.VideoFrame(width, height, "yuv420p")
            frame.pts = number
            yield from encoder.encode(frame)
        yield from encoder.encode(None)

    path = tmp_path / "sizes.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for packet in [*packets(64, 96, 0), *packets(32, 48, 5)]:
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            container.mux(packet)
    assert open_video(path, "pyav").read([0, 4]).shape == (2, 3, 64, 96)
    reason = "frame 7 of 10 cannot be read, it has 32 x 48 pixels, others 64 x 96"
    assert refusal(path, "pyav", [1, 7]) == reason


def test_pyav_goes_to_key_frames_only_where_that_saves_decoding(videos, monkeypatch):
    from train.readers import pyav

    decoded = []
    whole = pyav.Search._number

    def number(self, frame):
        decoded.append(frame.pts)
        return whole(self, frame)

    monkeypatch.setattr(pyav.Search, "_number", number)
    video = open_video(videos("h264.mp4"), "pyav")
    # Key frames are 0, 25 and 50; what stands before one and is shown after it costs a little more.
    for indices, most in (([59], 10), ([26, 27], 3), ([24, 26], 27), ([0, 24, 59], 35)):
        decoded.clear()
        assert numbers_of(video.read(indices)) == indices
        assert len(decoded) <= most, indices


def test_pyav_looks_again_from_the_start_where_a_key_frame_is_none(videos, monkeypatch):
    """Of a video that is refreshed part by part, some frames that are marked as keys are not."""
    from train.readers import pyav

    starts, start = [], pyav.Opened.start
    monkeypatch.setattr(pyav.Opened, "start", lambda self: (starts.append(1), start(self)))
    video = open_video(videos("refresh.mp4"), "pyav")
    starts.clear()
    assert numbers_of(video.read([21])) == [21]
    assert len(starts) == 2


def test_pyav_keeps_no_file_open(tmp_path):
    path = barcode.write_video(tmp_path / "one.mp4", 1)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"hello world\n" * 100)
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        for _ in range(250):
            video = open_video(path, "pyav")
            video.read([0])
            with pytest.raises(VideoError):
                open_video(broken, "pyav")
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
