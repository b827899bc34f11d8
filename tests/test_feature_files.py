"""A folder of features: what is in it and complete, who may write there, and what goes wrong."""

import errno
import json
import os
import tracemalloc
from contextlib import nullcontext
from copy import deepcopy
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import predict_suite as predicting
import pytest
from predict_suite import extract as extract
from predict_suite import feature_settings, only, stored
from predict_suite import one_thread as one_thread
from predict_suite import twenty as twenty
from predict_suite import videos as videos
from safetensors import safe_open

from train.extraction import read_clips
from train.feature_files import FeatureError, FeatureFile, FeatureSettings, claim, fits, target
from train.given import Given
from train.partial import Partial
from train.video import VideoError


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_what_is_complete_is_left_alone(extract, videos, tmp_path, monkeypatch, capsys, kind):
    words = (videos / "b" / "sub", videos / "c.mkv", "--format", kind)
    assert extract(tmp_path, *words) == 0
    assert capsys.readouterr().out == f"2 videos done, 0 were there: {tmp_path}\n"
    before, calls = stamps(tmp_path), predicting.recorded(monkeypatch)
    assert extract(tmp_path, *words) == 0
    assert capsys.readouterr().out == f"0 videos done, 2 were there: {tmp_path}\n"
    assert stamps(tmp_path) == before
    assert calls == []
    (tmp_path / f"five.mp4.{kind}").unlink()
    assert extract(tmp_path, *words) == 0
    assert len(calls) == 1
    after = stamps(tmp_path)
    assert after.keys() == before.keys()
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed == {f"five.mp4.{kind}"} | ({"five.mp4.npy.json"} if kind == "npy" else set())


def test_another_video_of_the_same_name_is_done_anew(extract, tmp_path):
    video, output = tmp_path / "in" / "x.mp4", tmp_path / "out"
    predicting.write_grey(video, 9)
    assert extract(output, video.parent) == 0
    predicting.write_grey(video, 20)
    assert extract(output, video.parent) == 0
    assert len(only(output)) == 3
    video.unlink()
    before = stamps(output)
    (video.parent / "y.txt").write_text("x.mp4\n")
    assert extract(output, video.parent / "y.txt") == 0
    assert stamps(output) == before


@pytest.mark.parametrize("has_older", [False, True])
def test_nothing_seems_complete_that_was_interrupted(extract, tmp_path, monkeypatch, has_older):
    """Nor the features of another video that was there before under this name."""

    def stop(*_):
        raise KeyboardInterrupt

    video, output = tmp_path / "in" / "x.mp4", tmp_path / "out"
    if has_older:
        predicting.write_grey(video, 9)
        assert extract(output, video.parent) == 0
    predicting.write_grey(video, 20)
    with monkeypatch.context() as patch:
        # Everything is written by then.
        patch.setattr("train.feature_files.Partial.rename", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(output, video.parent)
    calls = predicting.recorded(monkeypatch)
    assert extract(output, video.parent) == 0
    assert len(calls) == 1
    assert only(output).shape == (3, 128)


def test_other_settings_and_other_weights_are_refused(extract, twenty, tmp_path, capsys):
    output = tmp_path / "out"
    assert extract(output, twenty) == 0
    before = stamps(output)
    capsys.readouterr()
    assert extract(output, twenty, "--stride", "4", "--half") == 1
    said = capsys.readouterr().err
    differences = "stride: 8 -> 4; dtype: 'float32' -> 'float16'"
    assert said == (
        f"{output}: has features of other settings, {differences}: choose another --output\n"
    )
    other = deepcopy(predicting.trained_model())
    other.cls_head.fc_cls.bias.data += 1
    source = predicting.write_checkpoint(tmp_path / "other.pt", other)
    assert extract(output, twenty, source=source) == 1
    assert "checkpoint_sha256: " in capsys.readouterr().err
    assert stamps(output) == before
    (output / "settings.json").write_text("[")
    assert extract(output, twenty) == 1
    assert "must be the settings of features" in capsys.readouterr().err


def test_shards_have_each_video_once(extract, videos, tmp_path):
    (videos / "list.txt").write_text("b/twenty.mp4 0\nc.mkv 1\nb/sub/five.mp4 2\n")
    seen = []
    for index in (1, 2):
        before = set(stored(tmp_path))
        assert extract(tmp_path, videos / "list.txt", "--shard", f"{index}/2") == 0
        seen.append(sorted(set(stored(tmp_path)) - before))
    (videos / "list.txt").unlink()
    assert seen == [["b/sub/five.mp4.npy", "b/twenty.mp4.npy"], ["c.mkv.npy"]]
    assert not list(tmp_path.glob("settings.*-of-*"))


def test_broken_videos_are_named_counted_and_survived(extract, videos, tmp_path, capsys):
    assert extract(tmp_path, videos) == 1
    out, _ = capsys.readouterr()
    assert f"3 videos done, 0 were there: {tmp_path}\n" in out
    reason = "not a video decord can open"
    assert f"videos that could not be read: 1\n  b/broken.mp4: {reason}\n" in out
    assert (tmp_path / "broken.txt").read_text() == f"b/broken.mp4\t{reason}\n"
    names = {"b/twenty.mp4.npy", "b/sub/five.mp4.npy", "c.mkv.npy"}
    assert set(stored(tmp_path)) == names
    assert extract(tmp_path, videos / "b" / "sub") == 0
    assert not (tmp_path / "broken.txt").exists()


def test_a_video_that_breaks_off_leaves_nothing_and_the_next_is_whole(
    extract, videos, tmp_path, monkeypatch
):
    """The first clips were through the model by then."""
    plain = read_clips

    def broken(video, starts, settings):
        for number, clip in enumerate(plain(video, starts, settings)):
            if number == 2:
                raise VideoError(video.path, "it breaks off")
            yield clip

    monkeypatch.setattr("train.extraction.read_clips", broken)
    words = (videos / "b" / "twenty.mp4", videos / "c.mkv", "--batch-size", "1")
    assert extract(tmp_path, *words) == 1
    assert [Path(name).name for name in stored(tmp_path)] == ["c.mkv.npy"]
    assert len(only(tmp_path)) == 2
    assert (tmp_path / "broken.txt").read_text().endswith("twenty.mp4\tit breaks off\n")


# What goes wrong.


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_no_more_than_a_part_is_in_memory(tmp_path, kind):
    """Dense features of an hour would be gigabytes."""
    rows, starts = np.zeros((4, 64, 1024), np.float32), np.arange(100)
    source = tmp_path / "x.mp4"
    source.touch()
    words = {"row": rows.shape[1:], "dtype": "float32", "num_frames": 3, "fps": 25.0}
    tracemalloc.start()
    try:
        given = Given(str(source), "x.mp4")
        path = tmp_path / f"x.mp4.{kind}"
        file = FeatureFile(path, given, starts, **words)
        for number in range(25):
            rows[:] = number
            file.add(rows)
        file.finish()
        assert tracemalloc.get_traced_memory()[1] < rows.nbytes / 2
    finally:
        tracemalloc.stop()
    with safe_open(path, "np") if kind == "safetensors" else nullcontext() as opened:
        found = opened.get_tensor("features") if opened else np.load(path)
    assert np.array_equal(found[:, 5, 7], np.repeat(np.arange(25), 4))


def test_a_file_without_all_of_its_rows_gets_no_name(tmp_path):
    (tmp_path / "x.mp4").touch()
    words = {"row": (2,), "dtype": "float32", "num_frames": 3, "fps": 25.0}
    given = Given(str(tmp_path / "x.mp4"), "x.mp4")
    file = FeatureFile(tmp_path / "x.mp4.npy", given, np.arange(3), **words)
    file.add(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="8 bytes are missing"):
        file.finish()
    file.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_a_name_that_is_too_long_is_survived(extract, videos, tmp_path, capsys):
    long, output = "l" * 240 + ".mp4", tmp_path / "out"
    predicting.write_grey(tmp_path / "in" / long, 5)
    predicting.write_grey(tmp_path / "in" / "x.mp4", 5)
    for done in (1, 0):
        assert extract(output, tmp_path / "in") == 1
        out = capsys.readouterr().out
        assert f"{done} videos done, {1 - done} were there" in out
        assert f"could not be read: 1\n  {long}: its name is too long for a file" in out
    assert list(stored(output)) == ["x.mp4.npy"]
    settings = FeatureSettings(**json.loads((output / "settings.json").read_text()))
    for length in range(215, 256):
        path = target(output, Given("", "l" * length), settings)
        try:
            Partial(path.with_name(f"{path.name}.json")).discard()
        except OSError:
            assert not fits(path, output)
        else:
            assert fits(path, output)


def test_names_of_any_bytes_are_told(extract, tmp_path, monkeypatch):
    """On a strict standard output they would end the program behind its work."""
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.mp4")).write_text("no video")
    out = TextIOWrapper(BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", out)
    assert extract(tmp_path / "out", tmp_path / "in") == 1
    out.seek(0)
    assert "could not be read: 1\n  '\\udcff.mp4': " in out.read()
    assert (tmp_path / "out" / "broken.txt").read_bytes().startswith(b"\xff.mp4\t")


@pytest.mark.parametrize("links", [True, False])
def test_of_two_shards_with_other_settings_one_is_refused(tmp_path, monkeypatch, links):
    """Both had seen no settings when they began."""

    def link(own, path):
        if Path(own).name.startswith("settings.1-of-2"):
            claim(tmp_path, feature_settings(stride=4), (2, 2))
        if not links:
            raise OSError(errno.EPERM, "no links here")
        return plain(own, path)

    plain = os.link
    monkeypatch.setattr("train.feature_files.os.link", link)
    with pytest.raises(FeatureError, match="stride: 4 -> 8"):
        claim(tmp_path, feature_settings(), (1, 2))
    claim(tmp_path, feature_settings(stride=4), (1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_a_video_that_is_another_by_its_place_or_time_is_done_anew(extract, tmp_path, kind):
    one, two = (tmp_path / name / "x.mp4" for name in ("one", "two"))
    for path in (one, two):
        predicting.write_grey(path, 5)
        os.utime(path, (1, 1))
    assert one.stat().st_size == two.stat().st_size
    output = tmp_path / "out"
    for source in (one, two):
        before = stamps(output) if output.exists() else {}
        assert extract(output, source.parent, "--format", kind) == 0
        assert stamps(output) != before
    os.utime(two, ns=(1, 2))
    before = stamps(output)
    assert extract(output, two.parent, "--format", kind) == 0
    assert stamps(output) != before


@pytest.mark.parametrize("words", [[], ["--half"]])
def test_features_that_are_not_finite_are_refused(extract, videos, tmp_path, capsys, words):
    model = deepcopy(predicting.trained_model())
    norm = model.backbone.norm
    norm.weight.data[0], norm.bias.data[0] = 0, 1e6 if words else 3e38
    source = predicting.write_checkpoint(tmp_path / "broken.pt", model)
    given = (videos / "b" / "twenty.mp4", "--batch-size", "1", *words)
    assert extract(tmp_path / "out", *given, source=source) == 1
    said = "its features are NaN or infinite at --precision float32"
    said += ", or too large for --half" if words else ""
    out = capsys.readouterr().out
    assert f"0 videos done, 0 were there: {tmp_path / 'out'}\n" in out
    assert "could not be read: 1\n" in out
    assert f"twenty.mp4: {said}\n" in out
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {"settings.json", "broken.txt"}


def test_partial_files_have_the_number_of_their_process(extract, twenty, tmp_path, monkeypatch):
    written, plain = [], os.fsync
    monkeypatch.setattr(
        "os.fsync", lambda fd: written.append(os.readlink(f"/proc/self/fd/{fd}")) or plain(fd)
    )
    assert extract(tmp_path, twenty) == 0
    files = [Path(path).name for path in written if not Path(path).is_dir()]
    assert files == [f"twenty.mp4.npy{more}.{os.getpid()}.partial" for more in ("", ".json")]
