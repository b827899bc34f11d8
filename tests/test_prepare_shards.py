"""train.prepare index: where each video lies in the tar files, byte for byte."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("av")

from prepare_suite import lines, prepare, write_video

from train.data import DataSettings, open_listed
from train.lists import read_videos
from train.prepare import shards


def write_tar(path: Path, members: dict[str, bytes], format=tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def refusal(capfd, *words) -> str:
    assert prepare(*words) == 1
    return capfd.readouterr().err.strip().splitlines()[-1]


def content_of(root: Path, listed) -> bytes:
    return (root / listed.shard).read_bytes()[listed.offset :][: listed.size]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_the_bytes_are_where_the_index_says(tmp_path, format, capfd):
    long = "x" * 90 if format == tarfile.USTAR_FORMAT else "long name ü" * 20
    first = {
        "a b/1.mp4": b"one",
        f"./{long}/ü {long[:50]}.webm": os.urandom(513),
        "a b/1.json": b"{}",
        "a b/._1.mp4": b"hidden",
        "a b/empty.mp4": b"",
    }
    second = {"c/deep/er/2.MKV": os.urandom(1024), "alone.mp4": b"alone"}
    write_tar(tmp_path / "sub dir/s1.tar", first, format)
    path = write_tar(tmp_path / "sub dir/s0.tar", second, format)
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("z/2.mp4"))
        link = tarfile.TarInfo("z/link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "2.mp4"
        archive.addfile(link)
    assert prepare("index", tmp_path, "--shards", "*/*.tar") == 0
    classes = lines(tmp_path / "classes.txt")
    assert classes == sorted(["a b", "c", long])
    videos = list(read_videos(tmp_path, "index.txt", classes, "shards"))
    assert [v.shard for v in videos] == ["sub dir/s0.tar", "sub dir/s1.tar", "sub dir/s1.tar"]
    wanted = {name.removeprefix("./"): content for name, content in (first | second).items()}
    for video in videos:
        assert content_of(tmp_path, video) == wanted[video.name]
        assert classes[video.label] == video.name.partition("/")[0]
    said = capfd.readouterr().out
    assert "3 videos in 2 shards" in said
    assert "left out: 6" in said
    for name, reason in [
        ("s1.tar:a b/1.json", "no video by its suffix"),
        ("s1.tar:a b/._1.mp4", "hidden"),
        ("s1.tar:a b/empty.mp4", "empty"),
        ("s0.tar:alone.mp4", "not in the folder of a class"),
        ("s0.tar:z/link.mp4", "no plain file"),
    ]:
        assert f"{name}: it is {reason}" in said


def test_training_reads_what_was_packed(tmp_path):
    pytest.importorskip("decord")
    content = write_video(tmp_path / "a.mp4").read_bytes()
    write_tar(tmp_path / "s.tar", {"k/0.mp4": b"no video", "k/" + "l" * 120 + ".mp4": content})
    assert prepare("index", tmp_path) == 0
    settings = DataSettings(root=str(tmp_path), layout="shards")
    videos = settings.read("index.txt", ["k"])
    assert open_listed(videos[1], settings).num_frames == 12


def test_labels_of_a_list(tmp_path, capfd):
    write_tar(tmp_path / "s.tar", {f"x/{i} .mp4": bytes([i]) * 9 for i in range(1, 4)})
    labels = tmp_path / "train.txt"
    labels.write_text("x/3 .mp4 5\n./x/1 .mp4 0\ngone.mp4 2\n")
    words = ("index", tmp_path, "--labels", labels, "--output", "train index.txt")
    assert prepare(*words) == 0
    videos = list(read_videos(tmp_path, "train index.txt", range(6), "shards"))
    assert [(v.name, v.label) for v in videos] == [("x/1 .mp4", 0), ("x/3 .mp4", 5)]
    assert [content_of(tmp_path, v)[0] for v in videos] == [1, 3]
    said = capfd.readouterr().out
    assert "in the list of labels and in no shard: 1\n  gone.mp4" in said
    assert "s.tar:x/2 .mp4: it is not in the list of labels" in said
    assert not (tmp_path / "classes.txt").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_shards_for_testing_number_the_classes_as_those_for_training(tmp_path, capfd):
    write_tar(tmp_path / "train.tar", {f"{name}/1.mp4": b"x" for name in "abc"})
    write_tar(tmp_path / "test.tar", {"c/2.mp4": b"y"})
    for split in ("train", "test"):
        words = ("--shards", f"{split}.tar", "--output", f"{split}.txt")
        assert prepare("index", tmp_path, *words) == 0
    assert lines(tmp_path / "test.txt")[0].split("\t")[4] == "2"
    assert lines(tmp_path / "classes.txt") == ["a", "b", "c"]
    write_tar(tmp_path / "test.tar", {"d/2.mp4": b"y"})
    assert "none of the 3 classes" in refusal(capfd, "index", tmp_path, "--shards", "test.tar")


def test_a_name_in_two_shards_is_named(tmp_path, capfd):
    write_tar(tmp_path / "s0.tar", {"a/1.mp4": b"first", "a/2.mp4": b"x"})
    write_tar(tmp_path / "s1.tar", {"a/1.mp4": b"other"})
    assert "a/1.mp4 in s0.tar and s1.tar" in refusal(capfd, "index", tmp_path)
    videos = list(read_videos(tmp_path, "index.txt", ["a"], "shards"))
    assert [content_of(tmp_path, v) for v in videos] == [b"first", b"x"]


def test_names_whose_first_folder_is_no_class_are_left_out(tmp_path, capfd):
    write_tar(tmp_path / "s.tar", {"a/1.mp4": b"x", "/b/2.mp4": b"y", "c /3.mp4": b"z"})
    assert prepare("index", tmp_path) == 0
    assert lines(tmp_path / "classes.txt") == ["a"]
    said = capfd.readouterr().out
    assert "s.tar:/b/2.mp4: its name begins with a slash" in said
    assert "s.tar:c /3.mp4: of its folder: its name begins or ends with a space" in said


def test_a_file_with_holes_is_left_out(tmp_path, capfd):
    """GNU tar --sparse writes it shorter than it is."""
    with open(tmp_path / "holes.mp4", "wb") as file:
        file.truncate(10**6)
        file.seek(10**6)
        file.write(b"end")
    (tmp_path / "1.mp4").write_bytes(b"x" * 99)
    folder = ("--transform", "s,^,a/,")
    subprocess.run(
        ["tar", "--sparse", *folder, "-cf", "s.tar", "holes.mp4", "1.mp4"], cwd=tmp_path, check=True
    )
    assert prepare("index", tmp_path) == 0
    assert lines(tmp_path / "index.txt")[0].startswith("a/1.mp4\ts.tar\t")
    assert "s.tar:a/holes.mp4: it is no plain file" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("compress", "name"),
    [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz"), (None, "zstd")],
)
def test_compressed_tar_files_are_refused(tmp_path, capfd, compress, name):
    path = write_tar(tmp_path / "s.tar", {"a/1.mp4": b"x" * 99})
    path.write_bytes(compress(path.read_bytes()) if compress else b"\x28\xb5\x2f\xfd" + b"x" * 99)
    assert f"compressed with {name}" in refusal(capfd, "index", tmp_path)
    assert not (tmp_path / "index.txt").exists()


def test_damaged_tar_files_are_refused(tmp_path, capfd):
    path = tmp_path / "s.tar"
    whole = write_tar(path, {"a/1.mp4": b"x" * 2000, "a/2.mp4": b"y" * 3000}).read_bytes()
    for content, reason in [
        (whole[: 512 + 1000], "cut short, a/1.mp4 ends at byte 2512 of 1512"),
        (whole[: 512 + 2048 + 512 + 100], "cut short, a/2.mp4"),
        (whole[: 512 + 2048 + 200], "cut short, there is no block of zeros"),
        (whole[: 512 + 2048], "cut short, there is no block of zeros at its end, byte 2560"),
        (b"no tar file" * 99, "not a whole tar file"),
        (b"", "not a whole tar file"),
        (whole + whole, "there are data after its end"),
        (whole[: 512 + 2048] + b"?" * 512 + whole[512 + 2048 + 512 :], "tar file"),
    ]:
        path.write_bytes(content)
        assert reason in refusal(capfd, "index", tmp_path), reason
    path.unlink()
    assert "no file matches" in refusal(capfd, "index", tmp_path)
    write_tar(path, {"a/1.json": b"x"})
    assert "no video by its suffix" in refusal(capfd, "index", tmp_path)


def test_of_the_data_nothing_is_read(tmp_path, monkeypatch):
    write_tar(tmp_path / "s.tar", {f"a/{i}.mp4": b"x" * 100_000 for i in range(5)})
    seen = 0
    real = open

    def counting(*arguments):
        file = real(*arguments, buffering=0)

        class Counting(io.RawIOBase):
            def read(self, size=-1):
                nonlocal seen
                data = file.read(size)
                seen += len(data)
                return data

            def seek(self, *place):
                return file.seek(*place)

            def tell(self):
                return file.tell()

        return Counting()

    monkeypatch.setattr(shards, "open", counting, raising=False)
    assert len(list(shards.read_members(tmp_path / "s.tar"))) == 5
    assert 0 < seen < 30_000
