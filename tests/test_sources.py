"""One data set as files, a tree of classes, folders of frames and tar shards: the same clips."""

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av")
pytest.importorskip("decord")

from test_video import write_video

from train.augment import RandAugment, erase
from train.batches import ordered_batches
from train.data import (
    Broken,
    DataSettings,
    VideoDataset,
    Views,
    build_loader,
    collate,
    read_test_clips,
    sample_test_clips,
)
from train.lists import ListError
from train.optim import OptimSettings
from train.parallel import Group
from train.recipe import LoopSettings
from train.step import Stepper
from train.transforms import EvalTransform, normalize
from train.video import ReaderError, open_video

CPU = torch.device("cpu")
CLASSES = ["dig", "hop"]
SETTINGS = DataSettings(
    clip_len=4,
    interval=2,
    short_side=48,
    crop=32,
    test_clips=2,
    test_crops=3,
    test_short_side=32,
    val_short_side=40,
    workers=0,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two videos, the same as images without loss, and in a shard."""
    root = tmp_path_factory.mktemp("sources")
    (root / "classes.txt").write_text("dig\nhop\n")
    drawn = np.random.default_rng(0)
    lists = {name: [] for name in ("files", "frames", "shards")}
    for label, name in enumerate(CLASSES):
        path = root / "train" / name / "a b.mp4"
        path.parent.mkdir(parents=True)
        # Blocks, which survive the compression.
        blocks = drawn.integers(256, size=(11, 3, 4, 3), dtype=np.uint8)
        write_video(path, list(blocks.repeat(16, 1).repeat(16, 2)))
        folder = root / "frames" / name
        folder.mkdir(parents=True)
        frames = open_video(path).read(range(11)).permute(0, 2, 3, 1).numpy()
        for number, frame in enumerate(frames, 1):
            Image.fromarray(frame).save(folder / f"{number:03}.png")
        lists["files"].append(f"train/{name}/a b.mp4 {label}")
        lists["frames"].append(f"frames/{name} 11 {label}")
    with tarfile.open(root / "s.tar", "w") as tar:
        for name in CLASSES:
            tar.add(root / "train" / name / "a b.mp4", f"{name}/a b.mp4")
    with tarfile.open(root / "s.tar") as tar:
        for label, member in enumerate(tar):
            place = (member.name, "s.tar", member.offset_data, member.size, label)
            lists["shards"].append("\t".join(map(str, place)))
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def settings(root: Path, layout: str, **changes) -> DataSettings:
    place = {"root": str(root), "train_list": f"{layout}.txt", "frame_name": "{:03}.png"}
    if layout == "folders":
        layout, place["train_list"] = "files", "train"
    return replace(SETTINGS, layout=layout, **place, **changes)


def dataset(root: Path, layout: str, seed: int | None = None, **changes) -> VideoDataset:
    chosen = settings(root, layout, **changes)
    assert chosen.read_class_names() == CLASSES
    return VideoDataset(chosen.read(chosen.train_list, CLASSES), chosen, seed=seed)


@pytest.mark.parametrize("seed", [None, 3], ids=["testing", "training"])
@pytest.mark.parametrize("layout", ["folders", "frames", "shards"])
def test_however_a_video_is_kept_its_clips_are_the_same(root, layout, seed):
    kept, plain = dataset(root, layout, seed), dataset(root, "files", seed)
    assert len(kept) == len(plain) == 2
    for index in range(2):
        one, other = kept[1, index], plain[1, index]
        assert torch.equal(one.clips, other.clips)
        assert one.label == other.label == index


@pytest.mark.parametrize("layout", ["files", "shards"])
def test_another_reader_gives_the_same_clips(root, layout):
    for index in range(2):
        one = dataset(root, layout, reader="pyav")[0, index].clips
        assert torch.equal(one, dataset(root, layout)[0, index].clips)


def test_frames_of_a_test_are_read_once_and_few_at_a_time(root, monkeypatch):
    chosen = settings(root, "files", test_clips=4)
    video = open_video(root / "train" / "dig" / "a b.mp4")
    whole, asked, plain = read_test_clips(video, chosen), [], video.read
    monkeypatch.setattr(video, "read", lambda part: asked.append(part.tolist()) or plain(part))
    monkeypatch.setattr("train.data._FRAMES_AT_ONCE", 3)
    assert torch.equal(read_test_clips(video, chosen), whole)
    numbers = [number for part in asked for number in part]
    assert numbers == sorted(set(numbers))
    assert max(map(len, asked)) == 3
    frames = video.read(sample_test_clips(11, chosen, 4).ravel())
    expected = EvalTransform(32, 32, 3)(list(frames.split(4)))
    assert torch.equal(whole, expected)


def test_workers_read_shards(root):
    batches = ordered_batches(2, 1)
    found = list(build_loader(dataset(root, "shards", workers=2), batches, CPU))
    assert [batch.names for batch in found] == [["dig/a b.mp4"], ["hop/a b.mp4"]]
    assert not any(batch.broken for batch in found)


def test_the_views_of_validation_are_others_than_those_of_a_test(root):
    chosen = settings(root, "files")
    assert (chosen.test_views, chosen.val_views) == (Views(2, 3, 32), Views(1, 1, 40))
    videos = chosen.read("files.txt", CLASSES)
    assert VideoDataset(videos, chosen)[0, 0].clips.shape == (6, 3, 4, 32, 32)
    val = VideoDataset(videos, chosen, views=chosen.val_views)
    assert val[0, 0].clips.shape == (1, 3, 4, 32, 32)


def test_the_rule_of_the_offsets_reaches_the_clips(root):
    official, other = (settings(root, "files", offsets=rule) for rule in ("official", "mmaction2"))
    assert sample_test_clips(11, official, 2)[:, 0].tolist() == [1, 3]
    assert sample_test_clips(11, other, 2)[:, 0].tolist() == [0, 4]


def test_a_missing_frame_costs_its_video_alone(root):
    chosen = settings(root, "frames")
    (root / "more.txt").write_text("frames/dig 13 0\nframes/hop 11 1\n")
    videos = VideoDataset(chosen.read("more.txt", CLASSES), chosen, seed=1)
    found = [videos[epoch, 0] for epoch in range(20)]
    broken = [each for each in found if isinstance(each, Broken)]
    assert 0 < len(broken) < 20
    assert broken[0] == ("frames/dig", "picture 012.png is missing")
    assert not isinstance(videos[0, 1], Broken)


@pytest.mark.parametrize("name", ["img.jpg", "{}{}.jpg", "{x}.jpg", "{:05"])
def test_a_name_of_frames_without_their_number_is_refused(name):
    with pytest.raises(ValueError, match=r"^data\.frame_name must have one place for a number"):
        replace(SETTINGS, frame_name=name)


def test_a_shard_that_was_written_again_is_told_before_the_run(root):
    chosen = settings(root, "shards")
    name, shard, offset, *rest = (root / "shards.txt").read_text().splitlines()[0].split("\t")
    (root / "older.txt").write_text("\t".join([name, shard, str(int(offset) + 512), *rest]))
    with pytest.raises(ListError, match=r"older\.txt: cannot read .*older than the shard"):
        chosen.read("older.txt", CLASSES)


def test_a_reader_that_is_missing_is_told_before_the_run(root, monkeypatch):
    monkeypatch.setattr("train.data.why_not", lambda reader: f"no {reader} here")
    with pytest.raises(ReaderError, match=r"^no torchcodec here$"):
        settings(root, "files", reader="torchcodec").read("files.txt", CLASSES)
    # Frames need none.
    assert len(settings(root, "frames", reader="torchcodec").read("frames.txt", CLASSES)) == 2


# What the recipe for Something-Something does.


def test_augmented_clips_are_others_and_as_large(root, monkeypatch):
    plain = dataset(root, "files", seed=5)
    augmented = dataset(root, "files", seed=5, augment="randaugment")
    pairs = [(plain[epoch, 0].clips, augmented[epoch, 0].clips) for epoch in range(4)]
    assert all(one.shape == other.shape for one, other in pairs)
    assert not any(torch.equal(one, other) for one, other in pairs)
    again = dataset(root, "files", seed=5, augment="randaugment")
    assert torch.equal(again[2, 0].clips, pairs[2][1])
    # Whether they are flipped is a setting of its own.
    flips = []
    plain_draw = RandAugment.draw
    monkeypatch.setattr(
        RandAugment,
        "draw",
        lambda self, *arguments: flips.append(self.flip) or plain_draw(self, *arguments),
    )
    for flip in (0.0, 1.0):
        dataset(root, "files", seed=5, augment="randaugment", augment_flip=flip)[0, 0]
    assert flips == [0.0, 1.0]
    # Testing leaves frames alone.
    tests = [dataset(root, "files", augment=kind)[0, 0].clips for kind in ("none", "randaugment")]
    assert torch.equal(*tests)


def test_erased_boxes_go_with_their_clips_and_leave_the_draws_before_alone(root):
    plain, erased = dataset(root, "files", seed=5), dataset(root, "files", seed=5, erase=0.5)
    samples = [erased[epoch, index] for epoch in range(12) for index in range(2)]
    boxes = [sample.box for sample in samples]
    assert 2 < sum(box != (0, 0, 0, 0) for box in boxes) < 22
    # What is erased is the normalised clip: the frames are as they were.
    assert torch.equal(samples[1].clips, plain[0, 1].clips)
    assert collate(samples).boxes.tolist() == [list(box) for box in boxes]
    assert collate([Broken("a", "b")]).boxes.shape == (0, 4)


def test_the_model_sees_the_boxes_as_the_mean_colour():
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, clips):
            seen.append(clips.clone())
            return super().forward(clips.flatten(1))

    model = Model(3 * 2 * 8 * 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loop = LoopSettings(clips_per_pass=2)
    stepper = Stepper(model, optimizer, OptimSettings(), loop, (3, 2, 8, 8), Group(CPU))
    clips = torch.randint(256, (3, 3, 2, 8, 8), dtype=torch.uint8)
    boxes = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 8, 7]])
    stepper.step(clips, torch.arange(3), 3, 2, boxes)
    expected = normalize(clips)
    expected[0, :, :, 1:4, 2:6] = 0
    expected[2, :, :, :, :7] = 0
    assert torch.equal(torch.cat(seen), expected)
    assert torch.equal(erase(normalize(clips), boxes), expected)
    seen.clear()
    stepper.step(clips, torch.arange(3), 3, 2)
    assert torch.equal(torch.cat(seen), normalize(clips))
