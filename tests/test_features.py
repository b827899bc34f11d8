"""Features: of which frames they are, and that they are what the classifier sees."""

import json
import os
from pathlib import Path

import numpy as np
import predict_suite as predicting
import pytest
import torch
import train_suite as suite
from predict_suite import extract as extract
from predict_suite import feature_settings, numbers_of, only, stored
from predict_suite import one_thread as one_thread
from predict_suite import twenty as twenty
from predict_suite import videos as videos
from safetensors import safe_open

from model.weights import to_official, to_torchvision
from train import features
from train.extraction import clip_starts, read_clips
from train.recipes import RECIPES
from train.transforms import center_crop, normalize, resize_short_side, three_crop
from train.video import open_video

# The recipe's clips have 4 frames, every second one. Of 20 frames, the stride being 8:
STARTS = [0, 8, 12]


def clip_of(path: Path, start: int, cut=lambda frames: [center_crop(frames, 16)]) -> torch.Tensor:
    """The crops of a clip, float32 [crops, 3, T, H, W], read by themselves."""
    video = open_video(path)
    numbers = [(start + 2 * n) % video.num_frames for n in range(4)]
    views = cut(resize_short_side(video.read(numbers), 16))
    return normalize(torch.stack([view.transpose(0, 1) for view in views]))


# Which frames.


@pytest.mark.parametrize(
    ("num_frames", "stride", "starts"),
    [
        (20, 8, [0, 8, 12]),
        (24, 8, [0, 8, 16]),
        (20, 4, [0, 4, 8, 12]),
        (9, 8, [0, 1]),
        (8, 8, [0]),
        (7, 8, [0]),
        (1, 1, [0]),
        (11, 1, [0, 1, 2, 3]),
        (30, 20, [0, 20, 22]),
    ],
)
def test_clips_begin_at_each_stride_and_the_last_ends_with_the_video(num_frames, stride, starts):
    found = clip_starts(num_frames, clip_len=4, interval=2, stride=stride)
    assert found.tolist() == starts
    assert found.dtype == np.int64


def test_every_frame_is_within_a_clip_and_no_clip_beyond_the_video():
    generator = np.random.default_rng(0)
    for _ in range(300):
        num_frames, clip_len, interval = generator.integers(1, (120, 9, 5)).tolist()
        length = clip_len * interval
        stride = int(generator.integers(1, length, endpoint=True))
        starts = clip_starts(num_frames, clip_len=clip_len, interval=interval, stride=stride)
        within = {start + n for start in starts.tolist() for n in range(length)}
        assert set(range(num_frames)) <= within
        assert num_frames < length or max(within) == num_frames - 1
        assert (np.diff(starts) > 0).all()
        assert (np.diff(starts) <= stride).all()


@pytest.mark.parametrize("name", ["num_frames", "clip_len", "interval", "stride"])
def test_counts_below_one_are_refused(name):
    counts = {"num_frames": 9, "clip_len": 2, "interval": 1, "stride": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        clip_starts(**counts)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_clips_have_their_frames_and_each_is_read_once(twenty, monkeypatch, stride):
    video, read = open_video(twenty), []
    plain = video.read
    monkeypatch.setattr(video, "read", lambda numbers: read.extend(numbers) or plain(numbers))
    starts = clip_starts(20, clip_len=4, interval=2, stride=stride)
    clips = list(read_clips(video, starts, feature_settings()))
    expected = [[start + 2 * n for n in range(4)] for start in starts.tolist()]
    assert [numbers_of(clip[0]) for clip in clips] == expected
    assert sorted(read) == sorted({number for clip in expected for number in clip})


@pytest.mark.parametrize(("name", "expected"), [("b/sub/five.mp4", [0, 2, 4, 1])])
def test_a_short_video_begins_again(videos, name, expected):
    (clip,) = read_clips(open_video(videos / name), np.array([0]), feature_settings())
    assert numbers_of(clip[0]) == expected


def test_clips_of_a_video_without_times_decode_it_once_more(tmp_path, monkeypatch):
    """From the start for each clip, an hour of video would never end."""
    from train.readers import pyav

    path = predicting.write_grey(tmp_path / "grey.avi", 24, preset="veryfast", bf="2")
    decoded, plain = [], pyav.Search._number
    monkeypatch.setattr(
        pyav.Search, "_number", lambda self, frame: decoded.append(1) or plain(self, frame)
    )
    video = open_video(path, "pyav")
    assert video._times is None
    starts, before = clip_starts(24, clip_len=4, interval=2, stride=2), os.listdir("/proc/self/fd")
    clips = list(read_clips(video, starts, feature_settings(reader="pyav", stride=2)))
    found = [numbers_of(clip[0]) for clip in clips]
    assert found == [[start + 2 * n for n in range(4)] for start in starts.tolist()]
    assert len(decoded) == 23
    # Backwards it begins anew, and so after the last frame, which closes the file.
    for indices in ([7, 9], [9], [3, 23], [0]):
        assert numbers_of(video.read(indices).transpose(0, 1)[..., 40:]) == indices
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    del video
    assert len(os.listdir("/proc/self/fd")) == len(before)


# What is stored.


def test_pooled_features_are_what_the_classifier_turns_into_logits(extract, twenty, tmp_path):
    assert extract(tmp_path, twenty, "--batch-size", "2") == 0
    model, found = predicting.trained_model(), torch.from_numpy(only(tmp_path))
    clips = torch.cat([clip_of(twenty, start) for start in STARTS])
    with torch.no_grad():
        logits, ours = model(clips), model.cls_head.fc_cls(found)
    assert found.shape == (3, 128)
    assert found.dtype == torch.float32
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-6 * logits.abs().max().item())
    # Or any clip would do.
    assert (logits[0] - logits[1]).abs().max() > 0.01
    assert (logits[1] - logits[2]).abs().max() > 0.01


def test_dense_features_are_the_token_grid_and_their_mean_is_pooled(extract, twenty, tmp_path):
    for kind in ("pooled", "dense"):
        words = ("--clip-len", "5", "--short-side", "24", "--crop", "20", "--interval", "1")
        assert extract(tmp_path / kind, twenty, "--kind", kind, *words) == 0
    dense, pooled = only(tmp_path / "dense"), only(tmp_path / "pooled")
    # 5 frames are 3 tokens, 20 pixels 5, merged 3.
    assert dense.shape == (4, 128, 3, 3, 3)
    assert dense.dtype == np.float32
    np.testing.assert_allclose(dense.mean(axis=(2, 3, 4)), pooled, rtol=0, atol=1e-5)


def test_whole_frames_keep_their_shape(extract, twenty, tmp_path):
    words = ("--no-crop", "--kind", "dense", "--half", "--short-side", "24")
    assert extract(tmp_path, twenty, *words) == 0
    dense = only(tmp_path)
    # 24 x 40 pixels are 6 x 10 tokens, merged 3 x 5.
    assert dense.shape == (3, 128, 2, 3, 5)
    assert dense.dtype == np.float16
    frames = resize_short_side(open_video(twenty).read([12, 14, 16, 18]), 24)
    with torch.no_grad():
        expected = predicting.trained_model().backbone(normalize(frames.transpose(0, 1)[None]))
    np.testing.assert_allclose(dense[2], expected[0], rtol=2**-11, atol=1e-5)


def test_three_crops_are_averaged(extract, twenty, tmp_path):
    assert extract(tmp_path, twenty, "--crops", "3") == 0
    backbone = predicting.trained_model().backbone
    with torch.no_grad():
        crops = [clip_of(twenty, start, lambda f: three_crop(f, 16)) for start in STARTS]
        expected = [backbone(each).mean(dim=(0, 2, 3, 4)) for each in crops]
        centre = backbone(crops[0][2:]).mean(dim=(0, 2, 3, 4))
    found = torch.from_numpy(only(tmp_path))
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    assert (found[0] - centre).abs().max() > 1e-3


def test_npy_and_safetensors_hold_the_same(extract, twenty, tmp_path):
    for kind in ("npy", "safetensors"):
        assert extract(tmp_path / kind, twenty.parent / "sub", twenty, "--format", kind) == 0
    names = ["five.mp4", str(twenty).lstrip("/")]
    for name, starts, num_frames in zip(names, ([0], STARTS), (5, 20), strict=True):
        path = tmp_path / "npy" / f"{name}.npy"
        notes = json.loads(Path(f"{path}.json").read_text())
        with safe_open(tmp_path / "safetensors" / f"{name}.safetensors", "np") as file:
            assert np.array_equal(file.get_tensor("features"), np.load(path))
            assert file.get_tensor("starts").tolist() == notes["starts"] == starts
            assert file.get_tensor("starts").dtype == np.int64
            metadata = file.metadata()
        assert (metadata["num_frames"], metadata["fps"]) == (str(num_frames), "25.0")
        assert (notes["num_frames"], notes["fps"]) == (num_frames, 25.0)
        assert metadata["video"] == notes["video"]


@pytest.mark.parametrize("write", [to_official, to_torchvision])
def test_weights_of_other_programs_have_the_same_features(
    extract, twenty, tmp_path, monkeypatch, write
):
    monkeypatch.setitem(RECIPES, "tiny", predicting.recipe())
    torch.save(write(predicting.trained_model()), tmp_path / "weights.pth")
    given = {"source": tmp_path / "weights.pth"}
    assert extract(tmp_path / "theirs", twenty, "--recipe", "tiny", **given) == 0
    assert extract(tmp_path / "ours", twenty) == 0
    assert np.array_equal(only(tmp_path / "theirs"), only(tmp_path / "ours"))


def test_a_lower_precision_is_near(extract, twenty, tmp_path):
    assert extract(tmp_path / "low", twenty, "--precision", "bfloat16") == 0
    assert extract(tmp_path / "plain", twenty) == 0
    gap = np.abs(only(tmp_path / "low") - only(tmp_path / "plain")).max()
    assert 1e-6 < gap < 0.2
    assert only(tmp_path / "low").dtype == np.float32


@pytest.mark.parametrize("word", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_a_shard_that_is_none_is_refused(extract, tmp_path, capsys, word):
    with pytest.raises(SystemExit):
        extract(tmp_path, "x.mp4", "--shard", word)
    assert "must be I/N with I from 1 to N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--crops", "3", "--kind", "dense"), "got --kind dense and --crop 16"),
        (("--crops", "3", "--no-crop"), "got --kind pooled and --no-crop"),
        (("--crops", "3", "--short-side", "20"), "a --crop of --short-side 20, got"),
        (("--crop", "20"), "--crop must be at most --short-side 16, got 20"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    extract, twenty, tmp_path, capsys, words, said
):
    assert extract(tmp_path / "out", twenty, *words) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_an_interval_needs_one(extract, twenty, tmp_path, monkeypatch, capsys):
    uniform = suite.changed(
        predicting.recipe(), data={"sampling": "uniform", "test_clips": 1, "val_clips": 1}
    )
    monkeypatch.setitem(RECIPES, "tiny", uniform)
    torch.save(to_official(predicting.trained_model()), tmp_path / "weights.pth")
    words, given = ("--recipe", "tiny"), {"source": tmp_path / "weights.pth"}
    assert extract(tmp_path / "out", twenty, *words, **given) == 1
    assert capsys.readouterr().err.startswith("--interval is needed: the recipe spreads")
    assert extract(tmp_path / "out", twenty, *words, "--interval", "2", **given) == 0


# Who does it.


def test_each_process_of_torchrun_has_its_share(extract, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    seen = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        before = set(stored(tmp_path))
        assert extract(tmp_path, videos) == (rank == "0")
        seen.append(sorted(set(stored(tmp_path)) - before))
    # The first of the sorted four is broken.
    assert seen == [["b/twenty.mp4.npy"], ["b/sub/five.mp4.npy", "c.mkv.npy"]]
    assert (tmp_path / "broken.1-of-2.txt").exists()
    with pytest.raises(SystemExit):
        extract(tmp_path, videos, "--shard", "1/2")
    assert "torchrun has made this process 2/2: leave it out" in capsys.readouterr().err
    chosen = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert features.place("cuda") == ((2, 2), torch.device("cuda:1"))
    assert chosen == [torch.device("cuda:1")]
