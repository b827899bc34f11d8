"""bench/data.py: readers are compared, then timed; nothing is written where it is asked to stay."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("av")
pytest.importorskip("decord")

from bench import data
from train.lists import Listed
from train.synthetic import write_dataset
from train.video import open_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A data set of 16 frames of 64 x 80."""
    folder = tmp_path_factory.mktemp("videos")
    sizes = {"frames": 16, "height": 64, "width": 80}
    write_dataset(folder, videos_per_class=1, test_videos_per_class=0, workers=1, **sizes)
    return folder


def test_a_peer_reads_the_same_frames(videos):
    path = next(videos.rglob("*.mp4"))
    assert data.wrong("pyav", path) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_each_reader_has_a_row(videos, workers, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    words = ["--preset", "tiny", "--videos", str(videos), "--workers", str(workers)]
    words += ["--json", str(path), "--lines"]
    assert data.main(words) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["reader"] for row in rows][:2] == ["decord", "pyav"]
    for row in rows:
        assert (row["workers"], row["preset"]) == (workers, "tiny")
        # Of both entries.
        assert row["count"] == 2
        assert row["clips_per_s"] == pytest.approx(1e3 / row["ms"])
        assert str(videos) not in json.dumps(row)
    assert "clips/s" in capsys.readouterr().out
    # Called again, it measures nothing.
    assert data.main(words) == 0
    assert len(path.read_text().splitlines()) == 2


def test_a_reader_of_other_frames_has_no_time(videos, monkeypatch, capsys):
    class Reversed(type(open_video(next(videos.rglob("*.mp4")), "pyav"))):
        def _decode(self, unique):
            return super()._decode(unique)[::-1].copy()

    class Short(Reversed):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.num_frames -= 1

    words = ["--preset", "tiny", "--videos", str(videos), "--workers", "0", "--readers", "pyav"]
    for peer, said in ((Reversed, "levels of 255"), (Short, "it finds 15 frames of 16")):
        monkeypatch.setattr("train.readers.pyav.Reader", peer)
        assert data.main([*words, "--lines"]) == 1
        assert said in capsys.readouterr().out


@pytest.mark.slow
def test_lists_have_rows_of_their_own(videos, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    words = ["--preset", "tiny", "--videos", str(videos), "--workers", "0", "--lines", "1", "50"]
    assert data.main([*words, "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lists = [row for row in rows if row["bench"] == "lists"]
    assert [row["lines"] for row in lists] == [1, 50]
    for row in lists:
        assert 0 < row["ms"] < row["start_ms"]
        assert 0 < row["imports_mb"] <= row["peak_mb"]
    assert "ms to the first keys" in capsys.readouterr().out


def test_a_broken_video_ends_it_with_its_name(videos, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "train.txt").write_text("broken.mp4 0\n")
    (folder / "broken.mp4").write_bytes(b"no video")
    settings = data.DataSettings(root=str(folder), workers=0)
    dataset = data.VideoDataset([Listed("broken.mp4", 0)], settings, seed=0)
    with pytest.raises(RuntimeError, match=r"broken\.mp4: "):
        data.milliseconds_of(dataset, 1, 1)


def test_clips_are_counted_where_the_last_batch_of_an_epoch_is_small(monkeypatch):
    """Three videos by twos: batches of two and of one, each of which takes a second here."""
    now, given = [0.0], []

    def loader(dataset, keys, device):
        for batch in keys:
            given.append(len(batch))
            now[0] += 1.0
            yield SimpleNamespace(broken=[], labels=batch)

    monkeypatch.setattr(data, "build_loader", loader)
    monkeypatch.setattr(data.time, "perf_counter", lambda: now[0])
    dataset = data.VideoDataset([Listed("a.mp4", 0)] * 3, data.DataSettings(workers=2), seed=0)
    # Eight batches, four for each of the workers, behind the first of each.
    assert data.milliseconds_of(dataset, 2, 1) == pytest.approx(8e3 / sum(given[2:10]))
    assert given == [2, 1] * 5


def test_a_reader_that_breaks_leaves_the_others(videos, monkeypatch, capsys):
    def broken(*_):
        raise ImportError("there is no such reader")

    monkeypatch.setattr("train.readers.pyav.Reader", broken)
    words = ["--preset", "tiny", "--videos", str(videos), "--workers", "0", "--lines"]
    assert data.main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "failed: ImportError: there is no such reader" in lines[2]
    assert "failed" not in lines[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "-1"], "--workers must be 0 or more, got -1"),
        (["--videos", "nowhere"], "--videos: nowhere has no train.txt"),
        (["--lines", "0"], "--lines must be 1 or more, got 0"),
        (["--readers", "ffmpeg"], "invalid choice: 'ffmpeg'"),
    ],
)
def test_wrong_options_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        data.main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
