"""Folders of pictures read as videos: any access, and what is wrong with them by name."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

import barcode  # noqa: E402
from barcode import FRAMES, check_patterns, numbers_of  # noqa: E402

from train.readers.frames import FrameFolder  # noqa: E402
from train.video import VideoError  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 pictures, numbered from 1."""
    path = tmp_path_factory.mktemp("folder")
    for number in range(FRAMES):
        image = Image.fromarray(barcode.picture_of(number))
        image.save(path / f"img_{number + 1:05}.jpg", quality=90)
    return path


def copied(folder: Path, path: Path, names: int = 5) -> Path:
    for number in range(1, names + 1):
        name = f"img_{number:05}.jpg"
        (path / name).write_bytes((folder / name).read_bytes())
    return path


def test_random_access_to_a_folder(folder):
    check_patterns(FrameFolder(folder, FRAMES), 200)
    video = FrameFolder(folder, 2)
    assert (video.num_frames, video.fps, video.path) == (2, 0, str(folder))


def test_other_names_and_kinds_of_pictures(tmp_path):
    """Grey, with a palette, with transparency, and with an orientation that is ignored."""
    picture = Image.fromarray(barcode.picture_of(5))
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, mode in enumerate(["RGB", "L", "P", "RGBA"]):
        picture.convert(mode).save(tmp_path / f"{number}_frame.png", exif=exif)
    frames = FrameFolder(tmp_path, 4, "{}_frame.png", first=0).read([3, 2, 1, 0])
    assert frames.shape == (4, 3, 64, 96)
    assert numbers_of(frames) == [5, 5, 5, 5]
    assert torch.equal(frames[0], frames[3])


def test_faults_of_folders(tmp_path, folder):
    copied(folder, tmp_path)
    (tmp_path / "img_00002.jpg").unlink()
    data = (tmp_path / "img_00003.jpg").read_bytes()
    (tmp_path / "img_00003.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "img_00004.jpg").write_bytes(b"hello")
    Image.fromarray(barcode.picture_of(4)[:, :-2]).save(tmp_path / "img_00005.jpg")
    video = FrameFolder(tmp_path, 5)
    assert numbers_of(video.read([0])) == [0]
    cases = {
        1: "picture img_00002.jpg is missing",
        2: "picture img_00003.jpg cannot be decoded, it is damaged or none",
        3: "picture img_00004.jpg cannot be decoded, it is damaged or none",
        4: "picture img_00005.jpg has 64 x 94 pixels, others 64 x 96",
    }
    for index, reason in cases.items():
        with pytest.raises(VideoError) as caught:
            video.read([0, index])
        assert str(caught.value) == f"cannot read {tmp_path}: {reason}"


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").touch()
    for name, frames, reason in [
        ("missing", 5, "no such folder"),
        ("file", 5, "it is no folder of pictures"),
        ("", 0, "there are no frames in the video"),
    ]:
        with pytest.raises(VideoError) as caught:
            FrameFolder(tmp_path / name, frames)
        assert caught.value.reason == reason


@pytest.mark.parametrize("template", ["img.jpg", "img_{:05.jpg", "{}_{}.jpg", "{name}.jpg", "{:z}"])
def test_templates_need_a_place_for_the_number(folder, template):
    with pytest.raises(ValueError, match=r"^FrameFolder: template must have one place"):
        FrameFolder(folder, 5, template)
