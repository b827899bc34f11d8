"""train.prepare check: every kind of fault is found, and nothing is opened twice."""

import io
import json
import os
import tarfile

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("decord")
Image = pytest.importorskip("PIL.Image")

import barcode  # noqa: E402
from prepare_suite import greys, lines, prepare, write_video  # noqa: E402

from train.prepare import check  # noqa: E402
from train.prepare.workers import Died  # noqa: E402


@pytest.fixture
def opened(monkeypatch):
    """The names of the videos that are opened."""
    names, real = [], check.open_listed

    def counting(listed, settings):
        names.append(listed.name)
        return real(listed, settings)

    monkeypatch.setattr(check, "open_listed", counting)
    return names


@pytest.fixture
def root(tmp_path):
    """Three good videos of two classes."""
    for name in ("a/1.mp4", "a/2 x.mp4", "b/3.mp4"):
        write_video(tmp_path / name)
    (tmp_path / "train.txt").write_text("a/1.mp4 0\nb/3.mp4 1\n")
    (tmp_path / "test.txt").write_text("a/2 x.mp4 0\nb/3.mp4 1\n")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    return tmp_path


def faults(root, *words) -> dict[str, list[str]]:
    """What a check finds, by kind."""
    path = root / "found.json"
    status = prepare("check", root, "--json", path, *words)
    found = json.loads(path.read_text(encoding="utf-8"))["faults"]
    found = {kind: found for kind, found in found.items() if found}
    assert status == bool(found)
    return found


def test_nothing_is_wrong(root, opened, capfd):
    assert faults(root, "--list", "train.txt") == {}
    said = capfd.readouterr().out
    assert "train.txt: 2 videos" in said
    assert "all is well" in said
    assert opened == ["a/1.mp4", "b/3.mp4"]


def test_every_kind_of_fault(root, capfd):
    (root / "text ü.mp4").write_text("no video")
    (root / "train.txt").write_text(
        "a/1.mp4 0\na/1.mp4 0\na/2 x.mp4 0\na/2 x.mp4 1\ngone.mp4 1\ntext ü.mp4 7\n"
    )
    (root / "test.txt").write_text("a/1.mp4 0\nb/3.mp4 0\n")
    assert faults(root) == {
        "missing": ["gone.mp4 (train.txt)"],
        "listed twice": ["a/1.mp4 (train.txt)", "a/2 x.mp4 (train.txt)"],
        "with two labels": ["a/2 x.mp4 (train.txt): 0 and 1"],
        "in two lists": ["a/1.mp4 (train.txt and test.txt)"],
        "label out of range": ["text ü.mp4 (train.txt): 7, there are 2 classes"],
        "unreadable": ["text ü.mp4 (train.txt): not a video decord can open"],
        "classes without videos": ["b (test.txt)"],
    }
    said = capfd.readouterr().out
    assert "train.txt: 6 videos\ntest.txt: 2 videos\n" in said
    assert "missing: 1\n  gone.mp4 (train.txt)\n" in said
    assert "all is well" not in said


def test_of_many_the_first_twenty_are_shown_and_all_written(root, capfd):
    names = [f"gone {i:02}.mp4 0\n" for i in range(30)]
    (root / "train.txt").write_text("a/1.mp4 1\n" + "".join(names))
    found = faults(root, "--list", "train.txt")
    assert len(found["missing"]) == 30
    said = capfd.readouterr().out
    assert said.count("gone ") == 20
    assert "and 10 more" in said


def test_a_second_check_opens_only_what_is_new_or_changed(root, opened):
    (root / "bad.mp4").write_text("no video")
    (root / "train.txt").write_text("a/1.mp4 0\na/2 x.mp4 1\nbad.mp4 1\n")
    first = faults(root, "--list", "train.txt")
    assert len(opened) == 3
    opened.clear()
    assert faults(root, "--list", "train.txt") == first
    assert opened == ["bad.mp4"]
    opened.clear()
    # One is mended, one only touched, and a check was killed amid a line.
    write_video(root / "bad.mp4")
    os.utime(root / "a/1.mp4", ns=(1, 1))
    with open(root / "check.jsonl", "a") as file:
        file.write('{"path": "a/2')
    assert faults(root, "--list", "train.txt") == {}
    assert sorted(opened) == ["a/1.mp4", "bad.mp4"]
    opened.clear()
    assert faults(root, "--list", "train.txt") == {}
    assert opened == []
    # What another reader made of them, and decoding, is not known.
    assert faults(root, "--list", "train.txt", "--reader", "pyav") == {}
    assert faults(root, "--list", "train.txt", "--decode") == {}
    # decord's frames are compared with PyAV's.
    assert len(opened) == 9
    assert faults(root, "--list", "train.txt") == {}
    assert len(opened) == 9


@pytest.mark.parametrize("fault", [("unreadable", "input/output error"), Died(-9)])
def test_what_failed_is_opened_again(root, monkeypatch, fault):
    """The disk may have been at fault, or who killed the process."""
    with monkeypatch.context() as context:
        context.setattr(check, "each", lambda _, jobs, __: ((job, fault) for job in jobs))
        assert len(faults(root, "--list", "train.txt")["unreadable"]) == 2
    assert faults(root, "--list", "train.txt") == {}


def test_what_the_system_refuses_is_a_fault_of_the_video(root, monkeypatch):
    (root / "v").mkdir()
    Image.fromarray(greys(1)[0]).save(root / "v/img_00001.jpg")
    (root / "frames.txt").write_text("v 1 0\n")

    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(check.os, "listdir", refused)
    found = faults(root, "--list", "frames.txt", "--layout", "frames")
    assert found["unreadable"] == ["v (frames.txt): permission denied"]


def test_the_record_is_of_the_root(root, opened):
    """Wherever the list is; lists of two roots would call other files by the same path."""
    other = root / "other"
    write_video(other / "a/1.mp4")
    (other / "train.txt").write_text("a/1.mp4 0\n")
    (root / "both.txt").write_text("other/a/1.mp4 0\na/1.mp4 0\n")
    assert faults(root, "--list", "both.txt", "--classes", "none") == {}
    assert faults(other, "--list", root / "train.txt", "--classes", "none") != {}
    assert (other / "check.jsonl").exists()
    assert len(lines(root / "check.jsonl")) == 2
    opened.clear()
    assert faults(root, "--list", "other/../both.txt", "--classes", "none") == {}
    assert opened == []


@pytest.mark.parametrize("kind", ["open.mp4", "o20.mkv", "h264.avi", "mpeg4.avi", "refresh.mp4"])
def test_files_that_decord_misreads_are_found(root, kind):
    options = barcode.KINDS.get(kind, {"g": "20", "bf": "1", "x264-params": "open-gop=1"})
    barcode.write_video(root / "a/1.mp4", 60, **barcode.KINDS["h264.mp4"])
    barcode.write_video(root / kind, 60, **options)
    (root / "train.txt").write_text(f"a/1.mp4 0\n{kind} 1\n")
    words = ("--list", "train.txt", "--decode")
    reason = "decord gives other frames here: --data.reader=pyav reads them"
    assert faults(root, *words) == {"misread": [f"{kind} (train.txt): {reason}"]}
    assert faults(root, *words, "--reader", "pyav") == {}


def test_a_stopped_check_keeps_what_it_has(root, opened, monkeypatch):
    real = check.find_fault

    def stopped(job):
        if job.listed.name == "b/3.mp4":
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(check, "find_fault", stopped)
    assert prepare("check", root, "--list", "train.txt") == 130
    monkeypatch.setattr(check, "find_fault", real)
    assert faults(root, "--list", "train.txt") == {}
    assert opened == ["a/1.mp4", "b/3.mp4"]


def test_decoding_finds_what_opening_does_not(root):
    """Frames in the middle that are no frames: only reading them shows it."""
    noise = np.random.default_rng(0).integers(256, size=(12, 48, 64, 3), dtype=np.uint8)
    path = write_video(root / "a/1.mp4", list(noise))
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat"), content.index(b"moov")
    third = (end - start) // 3
    content[start + third : start + 2 * third] = bytes(third)
    path.write_bytes(content)
    assert faults(root, "--list", "train.txt") == {}
    assert "a/1.mp4" in faults(root, "--list", "train.txt", "--decode")["unreadable"][0]


def test_folders_of_classes_and_no_class_names(root, capfd):
    for name in ("classes.txt", "train.txt", "test.txt"):
        (root / name).unlink()
    (root / "set").mkdir()
    for name in "ab":
        (root / name).rename(root / "set" / name)
    assert faults(root, "--list", "set") == {}
    assert "set: 3 videos" in capfd.readouterr().out
    (root / "train.txt").write_text("set/b/3.mp4 9\n")
    assert faults(root) == {}
    assert "labels are compared with nothing" in capfd.readouterr().out


def test_folders_of_images(root):
    for name, count in (("v 1", 4), ("v2", 3), ("v3", 2)):
        (root / name).mkdir()
        for number, picture in enumerate(greys(count), start=1):
            Image.fromarray(picture).save(root / name / f"img_{number:05}.jpg")
    (root / "train.txt").write_text("v 1 4 0\nv2 3 1\nv3 3 1\nv4 3 1\n")
    (root / "v2/img_00002.jpg").write_bytes(b"no image")
    words = ("--list", "train.txt", "--layout", "frames")
    missing = {
        "missing": ["v4 (train.txt)"],
        "unreadable": ["v3 (train.txt): picture img_00003.jpg is missing"],
    }
    assert faults(root, *words) == missing
    found = faults(root, *words, "--decode")["unreadable"]
    assert ["v2" in line or "v3" in line for line in found] == [True, True]
    # An image that is overwritten, which is no change of its folder.
    (root / "v2/img_00002.jpg").write_bytes((root / "v2/img_00001.jpg").read_bytes())
    (root / "v3/img_00003.jpg").write_bytes((root / "v3/img_00001.jpg").read_bytes())
    (root / "train.txt").write_text("v 1 4 0\nv2 3 1\nv3 3 1\n")
    assert faults(root, *words, "--decode") == {}
    before = os.stat(root / "v3")
    (root / "v3/img_00002.jpg").write_bytes(b"no image")
    assert os.stat(root / "v3").st_mtime_ns == before.st_mtime_ns
    assert "v3" in faults(root, *words, "--decode")["unreadable"][0]


def test_shards(root, opened):
    with tarfile.open(root / "s.tar", "w") as archive:
        for name in ("a/1.mp4", "a/2 x.mp4", "b/3.mp4"):
            archive.add(root / name, name)
        archive.addfile(tarfile.TarInfo("b/none.mp4"))
        info = tarfile.TarInfo("b/bad.mp4")
        info.size = 9
        archive.addfile(info, io.BytesIO(b"no video."))
    assert prepare("index", root) == 0
    words = ("--list", "index.txt", "--layout", "shards", "--decode")
    bad = {"unreadable": ["b/bad.mp4 (index.txt): not a video decord can open"]}
    assert faults(root, *words) == bad
    opened.clear()
    assert faults(root, *words) == bad
    assert opened == ["b/bad.mp4"]
    text = (root / "index.txt").read_text().replace("\ts.tar", "\tgone.tar", 1)
    (root / "index.txt").write_text(text)
    found = faults(root, *words)
    assert found["missing"] == ["gone.tar:a/1.mp4 (index.txt)"]


def test_lists_that_cannot_be_read_are_refused(root, capfd):
    (root / "train.txt").write_text("a/1.mp4 0\na/2.mp4\n")
    for words, reason in [
        (("--list", "train.txt"), "train.txt:2: expected `path label`"),
        (("--list", "none.txt"), "none.txt: no such annotation list"),
    ]:
        assert prepare("check", root, *words) == 1
        assert reason in capfd.readouterr().err
    for name in ("train.txt", "test.txt"):
        (root / name).unlink()
    assert prepare("check", root) == 1
    assert "name the lists with --list" in capfd.readouterr().err


@pytest.mark.slow
def test_by_several_processes(root):
    assert faults(root, "--list", "train.txt", "--workers", 2) == {}
    assert len(lines(root / "check.jsonl")) == 2
