"""Frame sampling against indices recorded from the official implementation."""

import json
from pathlib import Path

import numpy as np
import pytest

from train.sampling import sample_interval, sample_uniform

GOLDEN = json.loads((Path(__file__).parent / "golden" / "frame_sampling.json").read_text())


def cases(mode: str) -> list[dict]:
    found = [case for case in GOLDEN if case["mode"] == mode]
    assert found, mode
    return found


def interval_of(case: dict, generator: np.random.Generator | None = None) -> np.ndarray:
    return sample_interval(
        case["total_frames"],
        clip_len=case["clip_len"],
        interval=case["frame_interval"],
        num_clips=case["num_clips"],
        generator=generator,
    )


@pytest.mark.trap(34)
def test_interval_of_test_mode_is_the_recorded_one():
    for case in cases("interval_test"):
        frames = interval_of(case)
        assert frames.shape == (case["num_clips"], case["clip_len"])
        assert frames.dtype == np.int64
        assert frames.ravel().tolist() == case["frame_inds"], case


@pytest.mark.trap(34)
def test_interval_offsets_are_the_published_ones():
    def offsets(num_frames, num_clips):
        return sample_interval(num_frames, clip_len=32, interval=2, num_clips=num_clips)[:, 0]

    assert offsets(300, 4).tolist() == [29, 88, 148, 207]
    assert offsets(250, 4).tolist() == [23, 70, 116, 163]
    assert offsets(63, 4).tolist() == [0, 0, 0, 0]
    assert offsets(300, 1).tolist() == [118]


def test_uniform_of_test_mode_is_the_recorded_one():
    for case in cases("uniform_test"):
        frames = sample_uniform(case["total_frames"], clip_len=case["clip_len"])
        assert frames.shape == (1, case["clip_len"])
        assert frames.dtype == np.int64
        assert frames.ravel().tolist() == case["frame_inds"], case


@pytest.mark.parametrize("case", cases("interval_train"), ids=lambda case: case["total_frames"])
def test_interval_of_train_mode_reaches_exactly_the_recorded_clips(case):
    generator = np.random.default_rng(0)
    drawn = {tuple(interval_of(case, generator).ravel().tolist()) for _ in range(1000)}
    assert drawn == {tuple(frames) for frames in case["reachable"]}


@pytest.mark.parametrize("case", cases("uniform_train"), ids=lambda case: case["total_frames"])
def test_uniform_of_train_mode_fills_the_recorded_range(case):
    generator = np.random.default_rng(0)
    drawn = np.concatenate(
        [
            sample_uniform(case["total_frames"], clip_len=case["clip_len"], generator=generator)
            for _ in range(1000)
        ]
    )
    assert drawn.dtype == np.int64
    assert drawn.min(0).tolist() == case["lowest"]
    assert drawn.max(0).tolist() == case["highest"]


@pytest.mark.parametrize(
    ("num_frames", "num_clips", "offsets"),
    [
        # Share of at least one position: clip k stays in the k-th share.
        (300, 4, [range(0, 59), range(59, 118), range(118, 177), range(177, 236 + 1)]),
        # Fewer positions than clips, but a video longer than a clip: sorted draws from all three.
        (66, 4, [range(0, 3)] * 4),
        # One position, four clips: k / 4 rounded, and the last clip wraps around the end.
        (64, 4, [range(0, 1)] * 3 + [range(1, 2)]),
        (63, 4, [range(0, 1)] * 4),
        (1, 4, [range(0, 1)] * 4),
    ],
)
def test_train_offsets_stay_in_their_shares(num_frames, num_clips, offsets):
    generator = np.random.default_rng(1)
    for _ in range(300):
        drawn = sample_interval(
            num_frames, clip_len=32, interval=2, num_clips=num_clips, generator=generator
        )[:, 0]
        assert (np.diff(drawn) >= 0).all()
        for offset, share in zip(drawn, offsets, strict=True):
            assert offset in share


def test_more_clips_than_frames_spread_by_rounding():
    # 8 frames, 10 clips of 6: 3 positions, floor(3 / 10) = 0, and 8 frames are not more than 10.
    frames = sample_interval(
        8, clip_len=6, interval=1, num_clips=10, generator=np.random.default_rng(0)
    )
    assert frames[:, 0].tolist() == np.round(np.arange(10) * 0.3).astype(int).tolist()


@pytest.mark.parametrize("generator", [None, np.random.default_rng(2)], ids=["test", "train"])
@pytest.mark.parametrize("num_frames", [1, 2, 20, 31])
def test_short_videos_start_again_or_repeat(num_frames, generator):
    frames = sample_interval(num_frames, clip_len=32, interval=2, generator=generator)
    assert frames.tolist() == [[(2 * i) % num_frames for i in range(32)]]
    frames = sample_uniform(num_frames, clip_len=32, generator=generator)
    assert frames.min() >= 0
    assert frames.max() < num_frames
    assert (np.diff(frames) >= 0).all()


def test_equal_generators_draw_equal_clips():
    def draw(seed):
        return sample_interval(
            300, clip_len=16, interval=4, num_clips=3, generator=np.random.default_rng(seed)
        ).tolist()

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


@pytest.mark.parametrize("num_frames", [0, -3])
def test_no_frames_are_refused(num_frames):
    with pytest.raises(ValueError, match=f"num_frames must be at least 1, got {num_frames}$"):
        sample_interval(num_frames, clip_len=8, interval=1)
    with pytest.raises(ValueError, match=f"num_frames must be at least 1, got {num_frames}$"):
        sample_uniform(num_frames, clip_len=8)


def test_other_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="clip_len must be at least 1"):
        sample_uniform(10, clip_len=0)
    with pytest.raises(ValueError, match="interval must be at least 1"):
        sample_interval(10, clip_len=2, interval=0)
    with pytest.raises(ValueError, match="num_clips must be at least 1"):
        sample_interval(10, clip_len=2, interval=1, num_clips=0)


@pytest.mark.trap(34)
@pytest.mark.parametrize(
    ("num_frames", "num_clips", "offsets"),
    [
        (300, 4, [0, 79, 158, 237]),
        (300, 1, [118]),
        # Half to even: 2.5 and 7.5.
        (73, 5, [0, 2, 5, 8, 10]),
        (63, 4, [0, 0, 0, 0]),
        (20, 2, [0, 0]),
    ],
)
def test_mmaction2_puts_the_first_clip_at_the_beginning_and_the_last_at_the_end(
    num_frames, num_clips, offsets
):
    found = sample_interval(
        num_frames, clip_len=32, interval=2, num_clips=num_clips, rule="mmaction2"
    )
    assert found.tolist() == [
        [(offset + step) % num_frames for step in range(0, 64, 2)] for offset in offsets
    ]
    # In training the rule is one.
    drawn = [
        sample_interval(
            num_frames,
            clip_len=32,
            interval=2,
            generator=np.random.default_rng(3),
            rule=rule,
        ).tolist()
        for rule in ("official", "mmaction2")
    ]
    assert drawn[0] == drawn[1]
