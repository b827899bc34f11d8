"""train.prepare reencode, the pictures: every frame once, upright, small, in its colours."""

from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from prepare_suite import (  # noqa: E402
    decoded,
    greys,
    lines,
    prepare,
    quarters,
    write_video,
)
from prepare_suite import folders as folders  # noqa: E402

from train.prepare import upright  # noqa: E402
from train.video import open_video, why_not  # noqa: E402


def brightness(pictures) -> list[float]:
    return [float(picture.mean()) for picture in pictures]


@pytest.mark.parametrize(
    ("height", "width", "result"),
    [
        (49, 65, (48, 64)),
        (48, 64, (48, 64)),
        (96, 128, (64, 86)),
        (128, 96, (86, 64)),
        (67, 203, (64, 194)),
        (90, 65, (88, 64)),
    ],
)
def test_the_short_side_shrinks_and_sides_are_even(folders, height, width, result):
    source, target = folders
    picture = quarters(height, width)
    write_video(source / "a.mkv", [picture] * 3, codec="ffv1", pixels="yuv444p")
    assert prepare("reencode", source, target, "--short-side", 64) == 0
    pictures, _ = decoded(target / "a.mp4")
    assert pictures.shape == (3, *result, 3)
    assert abs(result[1] / result[0] - width / height) < 0.03
    with av.open(str(target / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    # The pictures are the same, too, away from where the colours meet.
    for y, x in [(0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8)]:
        wanted = picture[int(y * height), int(x * width)].astype(int)
        got = pictures[1, int(y * result[0]), int(x * result[1])]
        assert np.abs(got - wanted).max() < 12


@pytest.mark.parametrize(
    ("codec", "pixels", "suffix"),
    [("mjpeg", "yuvj420p", "avi"), ("ffv1", "bgr0", "mkv"), ("libx264", "yuv420p10le", "mp4")],
)
@pytest.mark.parametrize("short_side", [32, 48])
def test_colours_stay_whatever_their_coding(folders, codec, pixels, suffix, short_side):
    source, target = folders
    write_video(source / f"a.{suffix}", codec=codec, pixels=pixels)
    before, _ = decoded(source / f"a.{suffix}")
    assert prepare("reencode", source, target, "--short-side", short_side) == 0
    after, _ = decoded(target / "a.mp4")
    at = [short_side // 4, short_side * 3 // 4]
    for y in (0, 1):
        for x in (0, 1):
            wanted = before[5, (12, 36)[y], (16, 48)[x]].astype(int)
            assert np.abs(after[5, at[y], at[x] * 4 // 3] - wanted).max() < 8


@pytest.mark.parametrize("is_full", [False, True], ids=["narrow", "full range"])
@pytest.mark.parametrize("matrix", [1, 6], ids=["BT.709", "BT.601"])
def test_colours_are_coded_as_the_file_says(folders, matrix, is_full):
    source, target = folders
    write_video(source / "a.mp4", matrix=matrix, is_full=is_full)
    assert prepare("reencode", source, target) == 0
    with av.open(str(target / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (6, 1)
    # Near the corners, of each file by each reader.
    rows, columns = np.ix_([4, 43], [4, 59])
    for reader in ("pyav", "decord"):
        for folder in folders if why_not(reader) is None else ():
            picture = open_video(folder / "a.mp4", reader).read([5])[0].permute(1, 2, 0).numpy()
            difference = picture[rows, columns].astype(int) - quarters()[rows, columns]
            assert np.abs(difference).max() <= 4, (reader, folder)


@pytest.mark.parametrize("short_side", [48, 24])
@pytest.mark.parametrize("turn", [0, 90, 180, -90])
def test_turned_upright(folders, turn, short_side):
    source, target = folders
    write_video(source / "a.mp4", rotation=turn)
    assert prepare("reencode", source, target, "--short-side", short_side) == 0
    pictures, _ = decoded(target / "a.mp4")
    with av.open(str(target / "a.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 0
    # The metadata count counter-clockwise, and so does NumPy.
    wanted = np.rot90(quarters(), turn // 90)[:: 48 // short_side, :: 48 // short_side]
    assert pictures[0].shape == wanted.shape
    assert np.abs(pictures[0].astype(int) - wanted).mean() < 6


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ([-1, 0, 0, 1], lambda p: p[:, ::-1]),
        ([1, 0, 0, -1], lambda p: p[::-1]),
        ([0, 1, 1, 0], lambda p: p.transpose(1, 0, 2)),
        ([0, -1, -1, 0], lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
    ],
    ids=["left-right", "up-down", "diagonal", "other diagonal"],
)
def test_a_mirrored_picture_is_shown_as_players_do(monkeypatch, tmp_path, matrix, turned):
    """PyAV writes no mirrored video, so that the matrix is put on the frames."""

    class Side(bytes):
        type = type("", (), {"name": "DISPLAYMATRIX"})

    a, b, c, d = (each << 16 for each in matrix)
    values = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], dtype=np.int32).tobytes()
    frame = type("", (), {"side_data": [Side(values)]})
    filters = upright.upright_filters(frame)
    write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(upright, "upright_filters", lambda _: filters)
    shown, _ = next(upright.read_upright(tmp_path / "a.mp4", 48, None, "rgb24"))
    assert np.abs(shown.to_ndarray().astype(int) - turned(quarters())).mean() < 6


def test_all_frames_at_their_times_with_b_frames(folders):
    source, target = folders
    times = [0, 40, 80, 300, 301, 340, 900, 930, 1000, 1700, 1733, 1766]
    pictures = greys(12)
    write_video(source / "a.mkv", pictures, times=times, bf="3", g="12")
    write_video(source / "b.avi", pictures, bf="2", b_adapt="0")
    write_video(source / "late.mkv", pictures, times=[each + 500 for each in times])
    with av.open(str(source / "b.avi")) as container:
        own = [frame.pts for frame in container.decode(video=0)]
    assert own != sorted(own), "this file is to have times in another order"
    assert prepare("reencode", source, target) == 0
    for name in ("a", "b", "late"):
        after, when = decoded(target / f"{name}.mp4")
        assert np.allclose(brightness(after), brightness(pictures), atol=4), name
        if name == "b":
            assert when == [Fraction(i, 24) for i in range(12)]
        else:
            assert when == [Fraction(each, 1000) for each in times]


def test_sound_is_dropped_and_keyframes_are_the_encoders(folders):
    source, target = folders
    write_video(source / "sound.mp4", [quarters()] * 80, sound=True, g="1")
    assert prepare("reencode", source, target) == 0
    with av.open(str(source / "sound.mp4")) as container:
        assert len(container.streams) == 2
    with av.open(str(target / "sound.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        keys = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert keys == [0, 32, 64]


def test_frames_become_images_at_the_rate_asked_for(folders):
    source, target = folders
    # Nearest to 0, 100, 200, ... ms: frame 1 is 60 ms late for 0 and 40 early for 100.
    write_video(source / "x y.mkv", greys(5), times=[0, 60, 110, 390, 420])
    assert prepare("reencode", source, target, "--frames", "--fps", 10) == 0
    names = sorted(path.name for path in (target / "x y").iterdir())
    assert names == [f"img_0000{i}.jpg" for i in range(1, 6)]
    images = [np.asarray(Image.open(target / "x y" / name)) for name in names]
    assert np.allclose(brightness(images), [20, 32, 32, 32, 44], atol=3)


def test_a_pause_of_a_broken_clock_is_refused(folders, capfd):
    source, target = folders
    write_video(source / "a.mkv", greys(2), times=[0, 10**7])
    write_video(source / "b.mkv", greys(2), times=[0, 10**5])
    assert prepare("reencode", source, target, "--fps", 2) == 0
    assert "between two frames are 10000 s" in lines(target / "broken.txt")[0]
    assert len(decoded(target / "b.mp4")[0]) == 201
