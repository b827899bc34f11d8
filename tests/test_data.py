"""From annotation lists to batches: what is read, in which order, and what is not readable."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("decord")

from test_video import grey, write_video

from train.batches import EpochBatches, ordered_batches, stream
from train.data import (
    FRAME_ORDERS,
    Broken,
    DataSettings,
    VideoDataset,
    broken_summary,
    build_loader,
)
from train.lists import Listed
from train.sampling import sample_interval, sample_uniform

CPU = torch.device("cpu")
FRAMES = 40
SETTINGS = DataSettings(
    clip_len=8,
    interval=2,
    short_side=32,
    crop=16,
    test_clips=1,
    test_crops=1,
    test_short_side=32,
    workers=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two videos, one of which tells its frame numbers, beside two files that are none."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "numbered.mp4", [grey(5 * i) for i in range(FRAMES)])
    noise = np.random.default_rng(0).integers(256, size=(FRAMES, 48, 64, 3), dtype=np.uint8)
    write_video(folder / "noise.mp4", list(noise))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "notes.mp4").write_text("no video\n")
    return folder


def dataset(folder: Path, names: list[str], seed: int | None = None, **changes) -> VideoDataset:
    videos = [Listed(f"{name}.mp4", label) for label, name in enumerate(names)]
    settings = replace(SETTINGS, root=str(folder), **changes)
    return VideoDataset(videos, settings, seed=seed)


def frame_numbers(clip: torch.Tensor) -> list[int]:
    """The numbers of the frames in a clip [3, T, H, W] of numbered.mp4."""
    return clip.float().mean(dim=(0, 2, 3)).div(5).round().int().tolist()


def epochs_of(batches: EpochBatches) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for batch in batches:
        for epoch, index in batch:
            found.setdefault(epoch, []).append(index)
    return found


# The order of the videos.


@pytest.mark.parametrize(("num_videos", "batch_size"), [(10, 4), (8, 4), (3, 5), (7, 1)])
def test_each_video_comes_once_in_an_epoch_and_the_last_batch_may_be_smaller(
    num_videos, batch_size
):
    batches = EpochBatches(num_videos, batch_size, seed=1, epochs=3)
    sizes = [len(batch) for batch in batches]
    full, rest = divmod(num_videos, batch_size)
    assert sizes == ([batch_size] * full + [rest] * (rest > 0)) * 3
    assert len(batches) == len(sizes)
    found = epochs_of(batches)
    assert list(found) == [0, 1, 2]
    assert all(sorted(order) == list(range(num_videos)) for order in found.values())
    # A batch never holds videos of two epochs.
    assert all(len({epoch for epoch, _ in batch}) == 1 for batch in batches)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        order
        for seed in (0, 1, 2)
        for order in epochs_of(EpochBatches(30, 4, seed=seed, epochs=3)).values()
    ]
    assert len({tuple(order) for order in orders}) == 9
    assert list(range(30)) not in orders


@pytest.mark.parametrize("step", [0, 1, 2, 3, 5, 8, 9, 12])
def test_going_on_at_any_step_gives_the_rest_of_the_run(step):
    whole = list(EpochBatches(10, 4, seed=5, epochs=3))
    rest = EpochBatches(10, 4, seed=5, epochs=3, first_step=step)
    assert list(rest) == whole[step:]
    assert len(rest) == len(whole[step:])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_processes_together_have_each_clip_of_a_step_once(world):
    """Also where a step has fewer clips than there are processes."""
    whole = EpochBatches(9, 4, seed=5, epochs=2, first_step=1)
    shares = [EpochBatches(9, 4, 5, 2, 1, rank, world) for rank in range(world)]
    for step, (batch, *parts) in enumerate(zip(whole, *shares, strict=True), 1):
        assert sorted(key for part in parts for key in part) == sorted(batch)
        assert {share.share_of(step) for share in shares} == {max(map(len, parts))}
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_pass_in_order_has_every_video_once():
    assert ordered_batches(5, 2) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]


# Randomness.


def test_no_two_epochs_seeds_or_videos_share_a_random_stream():
    drawn = {
        int(stream(kind, seed, epoch, index).integers(2**63))
        for kind in ("clip", "order")
        for seed in range(3)
        for epoch in range(12)
        for index in range(12)
    }
    assert len(drawn) == 2 * 3 * 12 * 12


def test_a_short_seed_is_not_the_one_with_zeros_behind_it():
    places = [(), (0,), (0, 0), (1, 2), (1, 2, 0), (1, 2, 0, 0), (0, 1, 2)]
    # A short kind, too: NumPy pads to four numbers and no further.
    drawn = {int(stream("c", *place).integers(2**63)) for place in places}
    assert len(drawn) == len(places)


def test_every_reading_of_a_video_in_training_is_another_clip(folder):
    # The same file three times, in two epochs of two seeds.
    clips = [
        dataset(folder, ["noise"] * 3, seed=seed)[epoch, index][0]
        for seed in (0, 1)
        for epoch in (0, 1)
        for index in range(3)
    ]
    assert clips[0].shape == (1, 3, 8, 16, 16)
    assert len({clip.numpy().tobytes() for clip in clips}) == 12
    assert torch.equal(clips[0], dataset(folder, ["noise"] * 3, seed=0)[0, 0][0])


@pytest.mark.parametrize("seed", [None, 3], ids=["testing", "training"])
def test_batches_do_not_depend_on_the_number_of_workers(folder, seed):
    names = ["noise", "numbered", "empty", "noise"]
    batches = list(EpochBatches(len(names), 3, seed=0, epochs=2))
    alone, shared = (
        list(build_loader(dataset(folder, names, seed, workers=workers), batches, CPU))
        for workers in (0, 2)
    )
    assert len(alone) == len(shared) == 4
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.clips, other.clips)
        assert torch.equal(one.labels, other.labels)
        assert one.broken == other.broken
    assert sum(len(batch.broken) for batch in alone) == 2


# Files that are no videos.


def test_the_rest_of_a_batch_survives_its_broken_videos(folder):
    names = ["numbered", "missing", "noise", "empty", "notes"]
    videos = dataset(folder, names, seed=0)
    (batch,) = build_loader(videos, ordered_batches(len(names), 8), CPU)
    assert batch.labels.tolist() == [0, 2]
    for row, index in enumerate((0, 2)):
        assert torch.equal(batch.clips[row], videos[0, index][0])
    assert batch.broken == [
        Broken("missing.mp4", "no such file"),
        Broken("empty.mp4", "the file is empty"),
        Broken("notes.mp4", "not a video decord can open"),
    ]


def test_only_what_is_read_for_long_is_given_up(folder):
    videos = dataset(folder, ["noise"] * 4, seed=0, workers=3)
    now = time.monotonic()
    videos._reading[:] = torch.tensor([[1, now - 9], [2, now - 2], [-1, now - 99]])
    videos.give_up(5)
    found = [videos[0, index] for index in range(4)]
    assert [isinstance(each, Broken) for each in found] == [False, True, False, False]
    # A worker that is started anew reads nothing yet.
    videos.give_up(0)
    assert not isinstance(videos[0, 2], Broken)


def test_a_batch_of_broken_videos_alone_is_empty(folder):
    (batch,) = build_loader(dataset(folder, ["empty", "notes"]), ordered_batches(2, 2), CPU)
    assert len(batch.clips) == len(batch.labels) == 0
    assert [video.path for video in batch.broken] == ["empty.mp4", "notes.mp4"]


def test_the_summary_counts_each_broken_video_once_and_is_short():
    broken = [Broken(f"{i % 30:02d}.mp4", "the file is empty") for i in range(90)]
    first, *lines, last = broken_summary(broken, limit=4).splitlines()
    assert first == "videos that could not be read: 30"
    assert lines == [f"  {i:02d}.mp4: the file is empty" for i in range(4)]
    assert last == "  and 26 more"
    assert broken_summary([]) == "videos that could not be read: 0"


# Which frames make up the views of testing.


def views(folder: Path, frame_order: str = "as filmed", index: int = 0, **changes) -> torch.Tensor:
    videos = dataset(folder, ["numbered"] * (index + 1), **changes)
    videos.frame_order = frame_order
    return videos[0, index][0]


def test_a_test_clip_is_as_filmed_unless_asked_otherwise(folder):
    expected = sample_interval(FRAMES, clip_len=8, interval=2)[0].tolist()
    assert frame_numbers(views(folder)[0]) == expected == sorted(expected)
    assert torch.equal(views(folder, "as filmed"), views(folder))


def test_backwards_is_the_same_frames_from_the_last_to_the_first(folder):
    assert frame_numbers(views(folder, "backwards")[0]) == frame_numbers(views(folder)[0])[::-1]


def test_one_frame_repeated_is_the_one_in_the_middle(folder):
    filmed = frame_numbers(views(folder)[0])
    assert frame_numbers(views(folder, "one frame repeated")[0]) == [filmed[4]] * 8


def test_random_order_is_a_permutation_that_stays_the_same_and_differs_by_video(folder):
    filmed = frame_numbers(views(folder)[0])
    shuffled = [frame_numbers(views(folder, "random order", index=i)[0]) for i in range(4)]
    assert all(sorted(order) == filmed for order in shuffled)
    assert len({tuple(order) for order in [filmed, filmed[::-1], *shuffled]}) == 6
    assert frame_numbers(views(folder, "random order")[0]) == shuffled[0]


@pytest.mark.parametrize("frame_order", FRAME_ORDERS)
def test_an_order_keeps_to_the_frames_of_each_clip(folder, frame_order):
    filmed = views(folder, test_clips=3)
    reordered = views(folder, frame_order, test_clips=3)
    for before, after in zip(filmed, reordered, strict=True):
        assert set(frame_numbers(after)) <= set(frame_numbers(before))


@pytest.mark.parametrize(("clips", "crops"), [(1, 1), (2, 1), (1, 3), (4, 3)])
def test_there_is_a_view_for_each_clip_and_crop(folder, clips, crops):
    found = views(folder, test_clips=clips, test_crops=crops, crop=32)
    assert found.shape == (clips * crops, 3, 8, 32, 32)
    assert found.dtype == torch.uint8
    expected = sample_interval(FRAMES, clip_len=8, interval=2, num_clips=clips).tolist()
    assert [frame_numbers(view) for view in found] == expected * crops


def test_uniform_sampling_has_one_clip_of_the_whole_video(folder):
    expected = sample_uniform(FRAMES, clip_len=8).tolist()
    found = views(folder, sampling="uniform", test_clips=4, test_crops=3, crop=32)
    assert [frame_numbers(view) for view in found] == expected * 3

    videos = dataset(folder, ["numbered"], seed=0, sampling="uniform")
    drawn = [frame_numbers(videos[epoch, 0][0][0]) for epoch in range(4)]
    bounds = np.round((FRAMES - 1) / 8 * np.arange(9)).tolist()
    for clip in drawn:
        for low, number, high in zip(bounds, clip, bounds[1:], strict=False):
            assert low <= number <= high
    assert len({tuple(clip) for clip in drawn}) > 1
