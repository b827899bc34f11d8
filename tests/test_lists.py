"""Lists of videos: files, folders of classes, folders of frames, tar shards and their index."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from train.lists import (
    Listed,
    ListError,
    Videos,
    find_class_names,
    find_videos,
    read_class_names,
    read_list,
    read_videos,
)

CLASSES = ["dig", "hop"]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_videos_are_what_was_listed_in_its_order():
    listed = [
        Listed("a/ü b.mp4", 3),
        Listed("", 0, 12),
        Listed("c", 1, shard="x.tar", offset=2**40, size=5),
        Listed("a/ü b.mp4", 2, shard="y.tar", offset=512, size=7),
    ]
    videos = Videos(iter(listed))
    assert list(videos) == listed
    assert list(videos.names()) == [each.name for each in listed]
    assert (videos[-1], videos[-4]) == (listed[-1], listed[0])
    assert videos.labels.tolist() == [3, 0, 1, 2]
    assert list(pickle.loads(pickle.dumps(videos))) == listed
    for index in (4, -5):
        with pytest.raises(IndexError):
            videos[index]
    more = Videos([*listed, listed[3]._replace(offset=9), listed[3]._replace(offset=99)])
    ends = [(each.shard, each.offset) for each in more.ends_of_shards()]
    assert ends == [("", 0), ("", 0), ("x.tar", 2**40), ("y.tar", 9), ("y.tar", 512)]


def test_the_digest_is_of_all_that_was_listed_and_of_its_order():
    listed = [Listed("ab", 1), Listed("c", 2, 3), Listed("d", 0, 0, "s.tar", 512, 9)]
    others = [
        listed[::-1],
        listed[:2],
        [Listed("a", 1), Listed("bc", 2, 3), listed[2]],
        [Listed("ab", 2), *listed[1:]],
        [listed[0], Listed("c", 2, 4), listed[2]],
        [*listed[:2], listed[2]._replace(shard="t.tar")],
        [*listed[:2], listed[2]._replace(offset=1024)],
    ]
    digests = {Videos(each).digest for each in [listed, *others]}
    assert len(digests) == 1 + len(others)
    assert Videos(listed).digest == Videos(list(listed)).digest


# Files.


def test_a_name_in_a_list_may_hold_spaces(tmp_path):
    text = "a/b.mp4 0\n\n  my holiday 2024.mp4   12\r\nc d/\u2028e.mp4\t3\n"
    found = read_list(written(tmp_path / "train.txt", text))
    pairs = [(each.name, each.label) for each in found]
    assert pairs == [("a/b.mp4", 0), ("my holiday 2024.mp4", 12), ("c d/\u2028e.mp4", 3)]


@pytest.mark.parametrize("line", ["a.mp4", "a.mp4 left", "a.mp4 -1", "a.mp4 1.5", "7", "a.mp4 0,"])
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line):
    path = written(tmp_path / "train.txt", f"a.mp4 0\n\n{line}\nb.mp4 1\n")
    with pytest.raises(ListError) as caught:
        read_list(path)
    assert str(caught.value) == f"{path}:3: expected `path label`, got {line!r}"


def test_a_label_without_a_class_is_refused(tmp_path):
    path = written(tmp_path / "train.txt", "a.mp4 0\nb.mp4 4\n")
    assert read_list(path, 5)[1] == Listed("b.mp4", 4)
    with pytest.raises(ListError) as caught:
        read_list(path, 4)
    assert str(caught.value) == f"{path}:2: label must be below 4, got 4"


def test_names_of_files_may_be_of_any_bytes(tmp_path):
    (tmp_path / "train" / "hop").mkdir(parents=True)
    with open(os.fsencode(tmp_path / "train" / "hop") + b"/caf\xe9.mp4", "wb"):
        pass
    (found,) = read_videos(tmp_path, "train", CLASSES)
    assert os.fsencode(found.name) == b"train/hop/caf\xe9.mp4"
    assert Videos([found]).digest != Videos([Listed("train/hop/caf.mp4", 1)]).digest


@pytest.mark.parametrize("line", ["a\0b.mp4 1", "a.mp4 99999999999999999999"])
def test_what_no_file_or_class_can_be_called_is_refused(tmp_path, line):
    with pytest.raises(ListError, match=r":1: expected `path label`, got "):
        read_list(written(tmp_path / "train.txt", line + "\n"))


@pytest.mark.parametrize("read", [read_list, read_class_names])
@pytest.mark.parametrize("text", [None, "", "\n  \n"])
def test_a_list_that_is_missing_or_empty_is_refused(tmp_path, read, text):
    path = tmp_path / "list.txt"
    if text is not None:
        written(path, text)
    with pytest.raises(ListError, match=r"list\.txt: ") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_an_empty_line_is_no_class(tmp_path):
    path = written(tmp_path / "classes.txt", "left\nto the right\n\n")
    assert read_class_names(path) == ["left", "to the right"]


def test_folders_of_frames_have_their_number(tmp_path):
    path = written(tmp_path / "train.txt", "my clip 120 1\nb/c 7 0\n")
    found = read_videos(tmp_path, "train.txt", CLASSES, "frames")
    assert list(found) == [Listed("my clip", 1, 120), Listed("b/c", 0, 7)]
    for line in ("clip 1", "clip x 1", "clip -3 1"):
        written(path, line)
        with pytest.raises(ListError, match=":1: expected `folder total label`, got "):
            read_videos(tmp_path, "train.txt", CLASSES, "frames")


def test_lists_may_have_tabs_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa b.mp4\t3\nc.mp4 \t 4\n")
    assert list(read_list(path)) == [Listed("a b.mp4", 3), Listed("c.mp4", 4)]


@pytest.mark.parametrize("read", [read_list, read_class_names])
def test_lists_of_another_encoding_are_refused(tmp_path, read):
    path = tmp_path / "list.txt"
    path.write_bytes("fran\xe7ais.mp4 1\n".encode("latin-1"))
    with pytest.raises(ListError, match="must be UTF-8 text, got byte 4 in another"):
        read(path)


# Folders of classes.


@pytest.fixture
def tree(tmp_path) -> Path:
    for name in ("hop/b.mp4", "hop/a.MKV", "dig/deep/c d.webm", "dig/notes.txt", "dig/.hidden.mp4"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def test_a_folder_a_class_is_a_list(tree):
    assert find_class_names(tree, "classes.txt", "train") == CLASSES
    found = read_videos(tree, "train", CLASSES)
    assert [(each.name, each.label) for each in found] == [
        *(("train/dig/deep/c d.webm", 0), ("train/hop/a.MKV", 1), ("train/hop/b.mp4", 1)),
    ]


def test_a_file_of_class_names_decides_the_labels_of_folders(tree):
    written(tree / "classes.txt", "hop\nrest\ndig\n")
    classes = find_class_names(tree, "classes.txt", "train")
    assert classes == ["hop", "rest", "dig"]
    assert [each.label for each in read_videos(tree, "train", classes)] == [2, 0, 0]


def test_links_in_folders_are_followed_but_not_in_circles(tree):
    (tree / "train" / "dig" / "deep" / "up").symlink_to(tree / "train" / "dig")
    (tree / "train" / "dig" / "self").symlink_to("self")
    (tree / "elsewhere").mkdir()
    (tree / "elsewhere" / "far.mp4").touch()
    (tree / "train" / "hop" / "linked").symlink_to(tree / "elsewhere")
    (tree / "train" / "hop" / "gone.mp4").symlink_to("nowhere")
    names = [path.name for path in find_videos(tree / "train")]
    assert names == ["c d.webm", "a.MKV", "b.mp4", "gone.mp4", "far.mp4"]


def test_what_is_no_tree_of_classes_is_refused(tree):
    with pytest.raises(ListError, match=r"train: its folder 'hop' is none of the classes$"):
        read_videos(tree, "train", ["dig"])
    (tree / "test" / "dig").mkdir(parents=True)
    with pytest.raises(ListError, match=r"test: there is no video in the folders"):
        read_videos(tree, "test", CLASSES)
    (tree / "bare").mkdir()
    with pytest.raises(ListError, match=r"bare: there is no folder of a class in it$"):
        find_class_names(tree, "classes.txt", "bare")
    with pytest.raises(ListError, match=r"train: of frames a list is needed; "):
        read_videos(tree, "train", CLASSES, "frames")


# Tar shards.

LONG = "x" * 90 + "/ü" * 30 + ".mp4"
MEMBERS = {"hop/a b.mp4": b"12345", LONG: bytes(range(256)) * 3, "dig/é.mp4": b"\0" * 600}


@pytest.fixture(params=[tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def shards(tmp_path, request) -> list[Listed]:
    """A shard with `MEMBERS`, and its index."""
    with tarfile.open(tmp_path / "s.tar", "w", format=request.param) as tar:
        for name, content in MEMBERS.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    with tarfile.open(tmp_path / "s.tar") as tar:
        listed = [Listed(m.name, 1, 0, "s.tar", m.offset_data, m.size) for m in tar]
    lines = "".join(f"{m.name}\ts.tar\t{m.offset}\t{m.size}\t{m.label}\n" for m in listed)
    written(tmp_path / "index.txt", lines)
    return listed


def test_a_member_of_a_shard_is_where_the_index_says(tmp_path, shards):
    from train.members import check_shards, member

    found = read_videos(tmp_path, "index.txt", CLASSES, "shards")
    assert list(found) == shards
    check_shards(tmp_path, found, "index.txt")
    for listed, content in zip(found, MEMBERS.values(), strict=True):
        where = member(tmp_path, listed)
        assert where.name == listed.name
        assert Path(where.path).read_bytes()[where.offset :][: where.size] == content


def test_an_index_older_than_its_shard_is_told(tmp_path, shards):
    from train.members import check_shards, member
    from train.video import VideoError

    older = "it is not where the index says, which is older than the shard: make it again$"
    wrong = [
        shards[0]._replace(offset=0),
        shards[0]._replace(offset=shards[0].offset + 512),
        shards[0]._replace(offset=shards[0].offset + 1),
        shards[0]._replace(offset=2**40),
        shards[0]._replace(size=4),
        shards[0]._replace(name="hop/a c.mp4"),
        shards[1]._replace(name="y" + LONG[1:]),
    ]
    for listed in wrong:
        with pytest.raises(VideoError, match=older):
            member(tmp_path, listed)
        with pytest.raises(ListError, match=older):
            check_shards(tmp_path, Videos([listed]), "index.txt")
    with pytest.raises(VideoError, match=r"t\.tar:.*: no such file or directory$"):
        member(tmp_path, shards[0]._replace(shard="t.tar"))


@pytest.mark.parametrize("line", ["a.mp4 1", "a\ts.tar\t1\t1", "a\ts.tar\t-1\t1\t1"])
def test_a_bad_line_of_an_index_is_named(tmp_path, line):
    written(tmp_path / "index.txt", line)
    with pytest.raises(ListError, match=":1: expected `name shard offset size label` with tabs"):
        read_videos(tmp_path, "index.txt", CLASSES, "shards")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the most memory is read from /proc")
def test_a_million_lines_are_read_in_seconds_and_in_little_memory(tmp_path):
    """In a process of its own: its most memory is what counts."""
    with open(tmp_path / "train.txt", "w") as file:
        for number in range(10**6):
            label = number % 400
            file.write(f"class {label}/video_{number:07d}_000010.mp4 {label}\n")
    program = (
        "import re, sys, time; began = time.monotonic(); from train.lists import read_list;"
        "from pathlib import Path; found = read_list(Path(sys.argv[1]), 400);"
        # What getrusage says is at least what the process had that started this one.
        "(most,) = re.findall(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text());"
        "print(len(found), time.monotonic() - began, int(most) / 1024)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "train.txt")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    count, seconds, megabytes = map(float, done.stdout.split())
    assert count == 10**6
    assert megabytes < 1000
    # An order of magnitude, not a measurement: bench/data.py has those.
    assert seconds < 60
