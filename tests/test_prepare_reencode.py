"""train.prepare reencode, the run: what it does again, what is broken, what stops it."""

import errno
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

av = pytest.importorskip("av")
Disposition = pytest.importorskip("av.stream").Disposition

import barcode  # noqa: E402
from prepare_suite import (  # noqa: E402
    decoded,
    error_of,
    greys,
    lines,
    prepare,
    quarters,
    square_or_end,
    touch,
    write_video,
)
from prepare_suite import folders as folders  # noqa: E402

from train.prepare import reencode, upright  # noqa: E402
from train.prepare.workers import Died, each  # noqa: E402

ROOT = Path(__file__).parents[1]


def test_a_second_run_does_only_the_rest(folders, monkeypatch, capfd):
    source, target = folders
    for name in ("a/one.mp4", "b/zwei ä.mkv", "three.avi"):
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        write_video(source / name, codec=codec)
    (source / "notes.txt").touch()
    assert prepare("reencode", source, target) == 0
    results = [target / name for name in ("a/one.mp4", "b/zwei ä.mp4", "three.mp4")]
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in results]
    results[1].unlink()
    asked = []
    convert = reencode._convert
    monkeypatch.setattr(reencode, "_convert", lambda job: asked.append(job[0]) or convert(job))
    assert prepare("reencode", source, target) == 0
    assert asked == ["b/zwei ä.mkv"]
    assert "1 videos written, 2 were there, 0 are broken" in capfd.readouterr().out
    after = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in results]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    left = sorted(path.name for path in target.iterdir() if path.name != ".reencode.lock")
    assert left == ["a", "b", "reencode.json", "three.mp4"]


@pytest.mark.parametrize("options", [[], ["--frames"]])
def test_what_is_older_than_its_source_is_made_anew(folders, options, capfd):
    source, target = folders
    for name in ("a.mp4", "b.mp4"):
        write_video(source / name)
    assert prepare("reencode", source, target, *options) == 0
    write_video(source / "a.mp4", greys(3))
    result = target / ("a" if options else "a.mp4")
    os.utime(result, ns=(0, os.stat(source / "a.mp4").st_mtime_ns - 1))
    assert prepare("reencode", source, target, *options) == 0
    assert len(list(result.iterdir()) if options else decoded(result)[0]) == 3
    assert "1 videos written, 1 were there" in capfd.readouterr().out


def test_broken_videos_are_named_and_survived(folders, capfd):
    source, target = folders
    write_video(source / "good.mp4")
    whole = write_video(source / "cut.mp4", [quarters()] * 40).read_bytes()
    (source / "cut.mp4").write_bytes(whole[:-500])
    (source / "text.mp4").write_text("hello\n" * 99)
    touch(source, "empty.webm")
    (source / "nowhere.mp4").symlink_to("gone.mp4")
    with av.open(str(source / "heard.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert prepare("reencode", source, target) == 0
    assert "1 videos written, 0 were there, 5 are broken" in capfd.readouterr().out
    named = [line.split("\t") for line in lines(target / "broken.txt")]
    assert [name for name, _ in named] == [
        *("cut.mp4", "empty.webm", "heard.mp4", "nowhere.mp4", "text.mp4")
    ]
    reasons = ("truncated", "empty", "no video stream", "leads nowhere", "not a video")
    assert all(word in reason for word, (_, reason) in zip(reasons, named, strict=True))
    assert [path.name for path in target.glob("*.mp4")] == ["good.mp4"]
    # Mended and removed, they are no longer named.
    (source / "cut.mp4").write_bytes(whole)
    for name in ("empty.webm", "heard.mp4", "nowhere.mp4", "text.mp4"):
        (source / name).unlink()
    assert prepare("reencode", source, target) == 0
    assert not (target / "broken.txt").exists()
    assert (target / "cut.mp4").exists()


@pytest.mark.parametrize("start", [0.3, 0.7])
@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "b.avi"])
def test_a_video_that_is_damaged_within_is_broken(folders, name, start):
    """FFmpeg goes on behind the damage, and gives the frames that are left."""
    source, target = folders
    codec = "mpeg4" if name == "a.avi" else "libx264"
    noise = np.random.default_rng(0).integers(256, size=(60, 32, 48, 3), dtype=np.uint8)
    whole = write_video(source / name, list(noise), codec=codec, g="15").read_bytes()
    damaged, place = bytearray(whole), int(start * len(whole))
    damaged[place : place + len(whole) // 10] = bytes(len(whole) // 10)
    (source / name).write_bytes(damaged)
    assert prepare("reencode", source, target) == 1
    assert re.search("damaged|cannot be decoded", lines(target / "broken.txt")[0])
    assert not list(target.glob("*.mp4"))
    (source / name).write_bytes(whole)
    assert prepare("reencode", source, target) == 0
    assert len(decoded(next(target.glob("*.mp4")))[0]) == 60


@pytest.mark.parametrize(("kind", "start"), [("vp9.webm", 0.5), ("vp9.webm", 0.7)])
def test_a_video_that_ends_before_it_says_is_broken(folders, kind, start):
    """All frames up to the damage are whole, and none comes after it."""
    source, target = folders
    path = barcode.write_video(source / kind, 60, **barcode.KINDS[kind])
    data = bytearray(path.read_bytes())
    place, length = int(start * len(data)), len(data) // 10
    data[place : place + length] = bytes(length)
    path.write_bytes(data)
    assert prepare("reencode", source, target) == 1
    assert "it is damaged, its frames end at" in lines(target / "broken.txt")[0]


def test_what_has_no_decoder_or_a_cover_alone_is_no_video(folders):
    source, target = folders
    data = write_video(source / "codec.mkv").read_bytes()
    assert data.count(b"V_MPEG4/ISO/AVC") == 1
    (source / "codec.mkv").write_bytes(data.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC"))
    with av.open(str(source / "cover.mp4"), "w") as container:
        heard, cover = container.add_stream("aac", rate=44100), container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 22050), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        picture = av.VideoFrame.from_ndarray(quarters(), format="rgb24").reformat(format="yuvj420p")
        for stream, each_frame in ((cover, picture), (heard, frame)):
            container.mux([*stream.encode(each_frame), *stream.encode()])
    write_video(source / "good.mp4")
    assert prepare("reencode", source, target) == 0
    assert lines(target / "broken.txt") == [
        "codec.mkv\tthere is no decoder for its video stream",
        "cover.mp4\tthere is no video stream in the file",
    ]


def test_paths_that_look_like_protocols_and_files_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "from:here/http:a.mp4")
    os.mkfifo("from:here/pipe.mp4")
    assert prepare("reencode", "from:here", "to:there") == 0
    assert Path("to:there/http:a.mp4").exists()
    assert lines(Path("to:there/broken.txt")) == ["pipe.mp4\tit is no regular file"]


def test_where_all_are_broken_the_status_says_so(folders):
    source, target = folders
    touch(source, "a.mp4")
    assert prepare("reencode", source, target) == 1


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["c/a.avi", "c/a.mkv"], []),
        (["c/a.mp4", "c/a.MP4"], []),
        (["c/a.avi", "c/a.mkv"], ["--frames"]),
        (["c/a.avi", "c/a/b.avi"], ["--frames"]),
        (["c/a.avi", "c/a.mp4/b.avi"], []),
    ],
)
def test_two_videos_of_one_result_are_refused_before_any_work(folders, capfd, names, options):
    source, target = folders
    touch(source, *names)
    error = error_of(capfd, "reencode", source, target, *options)
    assert all(name in error for name in names)
    assert not target.exists()


def test_what_would_mix_or_disturb_is_refused(folders, capfd):
    source, target = folders
    write_video(source / "a.mp4")
    assert "no such folder" in error_of(capfd, "reencode", source / "no", target)
    assert "lies in" in error_of(capfd, "reencode", source, source / "small")
    assert "even" in error_of(capfd, "reencode", source, target, "--short-side", 255)
    assert "from 0.001" in error_of(capfd, "reencode", source, target, "--fps", 0.0004)
    write_video(target / "own.mp4")
    assert "of another origin" in error_of(capfd, "reencode", source, target)
    (target / "own.mp4").unlink()
    (target / "a").mkdir()
    assert "of another origin" in error_of(capfd, "reencode", source, target, "--frames")
    (target / "a").rmdir()
    assert prepare("reencode", source, target) == 0
    capfd.readouterr()
    assert "other settings" in error_of(capfd, "reencode", source, target, "--short-side", 128)
    with FileLock(target / ".reencode.lock"):
        assert "another process" in error_of(capfd, "reencode", source, target)
    (target / "reencode.json").write_text("")
    assert "other settings, which none knows" in error_of(capfd, "reencode", source, target)


def test_an_interrupted_run_leaves_no_half_file(folders, monkeypatch, capfd):
    source, target = folders
    write_video(source / "a.mp4")
    write_video(source / "b.mp4", greys(12))
    for options in ([], ["--frames"]):
        with monkeypatch.context() as context:
            read, seen = reencode.read_upright, []

            def stopped(*arguments, read=read, seen=seen):
                for each in read(*arguments):
                    seen.append(each)
                    if len(seen) == 18:
                        raise KeyboardInterrupt
                    yield each

            context.setattr(reencode, "read_upright", stopped)
            assert prepare("reencode", source, target, *options) == 130
        suffix = "" if options else ".mp4"
        assert (target / f"a{suffix}").exists()
        assert not (target / f"b{suffix}").exists()
        assert not list(target.glob(".partial-*"))
        # What a killed process could not remove, the next one does.
        (target / ".partial-left").mkdir()
        (target / ".partial-left" / "1.mp4").write_bytes(b"half")
        assert prepare("reencode", source, target, *options) == 0
        assert (target / f"b{suffix}").exists()
        assert not list(target.glob(".partial-*"))
        shutil.rmtree(target)


def test_a_full_disk_is_no_broken_video(folders, monkeypatch, capfd):
    source, target = folders
    write_video(source / "a.mp4")

    def full(self, other):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    assert prepare("reencode", source, target) == 1
    assert f"cannot write {target / 'a.mp4'}: No space left on device" in capfd.readouterr().err
    assert not (target / "broken.txt").exists()


@pytest.mark.parametrize("options", [[], ["--frames"]])
def test_a_disk_that_takes_a_part_only_is_no_broken_video(folders, options, capfd):
    """A limit on the size of files is met as a full disk is: by a write that is short."""
    source, target = folders
    noise = np.random.default_rng(0).integers(256, size=(8, 64, 96, 3), dtype=np.uint8)
    write_video(source / "a.mp4", list(noise))
    result = target / ("a" if options else "a.mp4")
    assert prepare("reencode", source, target, *options) == 0
    size = max(path.stat().st_size for path in (result.iterdir() if options else [result]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (size // 3, size - 9, size - 1):
        shutil.rmtree(target)
        # Python ignores the signal that comes with it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            status = prepare("reencode", source, target, *options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert status == 1
        assert f"cannot write {result}: " in capfd.readouterr().err
        left = sorted(path.name for path in target.iterdir())
        assert left == [".reencode.lock", "reencode.json"]


def test_frames_wait_for_their_times_when_they_are_small(folders, monkeypatch):
    source, target = folders
    write_video(source / "a.mp4", [quarters(96, 128)] * 30)
    seen, real = [], upright._with_times

    def watched(frames, step):
        frames = list(frames)
        seen.extend((frame.width, frame.height) for (frame, _), _ in frames)
        return real(frames, step)

    monkeypatch.setattr(upright, "_with_times", watched)
    assert prepare("reencode", source, target, "--short-side", 24) == 0
    assert seen == [(32, 24)] * 30


def test_workers_survive_the_death_of_one():
    results = dict(each(square_or_end, [1, 2, 3, 4], 2))
    assert results == {1: 1, 2: 4, 3: Died(9), 4: 16}
    assert "status 9" in results[3].reason
    with pytest.raises(RuntimeError, match="no room for 5"):
        list(each(square_or_end, [4, 5, 6], 2))


def test_one_worker_is_another_process_and_one_that_is_gone_is_replaced():
    others = multiprocessing.active_children()

    def jobs():
        yield 3
        yield 2
        # Of the only worker, which has no job while it is asked for the next.
        (child,) = [each for each in multiprocessing.active_children() if each not in others]
        child.kill()
        child.join()
        yield 4

    assert dict(each(square_or_end, jobs(), 1)) == {3: Died(9), 2: 4, 4: 16}


def is_running(group: int) -> bool:
    """Whether a group of processes has any."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_half_file_and_no_process(folders, number):
    source, target = folders
    generator = np.random.default_rng(0)
    noise = list(generator.integers(256, size=(60, 120, 160, 3), dtype=np.uint8))
    for name in "ab":
        write_video(source / f"{name}.mp4", noise * 2)
    command = [sys.executable, "-m", "train.prepare", "reencode", source, target, "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in target.glob(".partial-*/*")):
        assert process.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    process.wait()
    assert not list(target.glob("*.mp4"))
    # Its workers end with it, each in its own time.
    deadline = time.monotonic() + 20
    while is_running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(process.pid)
    assert not list(target.glob("*.mp4"))
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert [len(decoded(target / f"{name}.mp4")[0]) for name in "ab"] == [120] * 2
    assert not list(target.glob(".partial-*"))
