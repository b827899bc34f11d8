"""Videos whose frames tell their number, and a model with weights that tell one from another."""

from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("decord")
pytest.importorskip("tyro")

import av
import train_suite as suite

from model import VideoSwin, create
from train import features
from train.checkpoint import KEYS, save_checkpoint
from train.feature_files import FeatureSettings
from train.recipe import Recipe, to_dict

# Between the brightnesses of two frames; decoding is off by one or two.
STEP = 6
CLASSES = ("left", "right", "Straße queren", "up", "down", "спин", "grow", "shrink")


def write_grey(path: Path, frames: int, height: int = 48, width: int = 80, **options: str) -> Path:
    """A video of which frame i has the brightness 6 i, and more at its left and right ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"threads": "1", "preset": "ultrafast", "g": "12", **options}
        for number in range(frames):
            picture = np.full((height, width, 3), STEP * number, dtype=np.uint8)
            picture[:, : width // 8] += 100
            picture[:, width * 3 // 4 :] += 40
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers_of(clip: torch.Tensor) -> list[int]:
    """The frame numbers of a clip, uint8 [3, T, H, W], by the brightness of its third column."""
    return (clip[:, :, :, 2].float().mean(dim=(0, 2)) / STEP).round().int().tolist()


@cache
def trained_model() -> VideoSwin:
    """Weights far larger than one begins with: the scores of two frames differ by percents."""
    torch.manual_seed(3)
    model = create("swin_nano", num_classes=len(CLASSES), kernels="reference").eval()
    model.backbone.init_weights(0.3)
    torch.nn.init.normal_(model.cls_head.fc_cls.weight, std=0.3)
    return model


def recipe() -> Recipe:
    """Three clips of 4 frames, every second one, and three crops of each of 16 x 16 pixels."""
    views = {"clip_len": 4, "interval": 2, "test_clips": 3, "test_crops": 3}
    return suite.changed(suite.tiny_recipe(Path("nowhere")), data=views)


def write_checkpoint(path: Path, model: VideoSwin | None = None) -> Path:
    """A checkpoint as a run leaves it, of which only what is loaded is true."""
    state = dict.fromkeys(KEYS)
    weights = (model or trained_model()).state_dict()
    own = {"model": weights, "recipe": to_dict(recipe()), "classes": list(CLASSES)}
    save_checkpoint(path, {**state, **own})
    return path


def write_videos(folder: Path) -> Path:
    """A folder of three videos of 20, 13 and 5 frames, and one that is none."""
    write_grey(folder / "b" / "twenty.mp4", 20)
    write_grey(folder / "c.mkv", 13)
    write_grey(folder / "b" / "sub" / "five.mp4", 5)
    (folder / "b" / "broken.mp4").write_text("no video\n")
    return folder


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the clips that a backbone will be given, call by call."""
    found, kind = [], type(trained_model().backbone)
    plain = kind.forward

    def forward(self, clips):
        found.append(tuple(clips.shape))
        return plain(self, clips)

    monkeypatch.setattr(kind, "forward", forward)
    return found


def feature_settings(**values) -> FeatureSettings:
    """Of the recipe's clips, pooled, but for these values."""
    plain = {
        **{"checkpoint_sha256": "", "model": "swin_nano", "clip_len": 4, "interval": 2},
        **{"stride": 8, "kind": "pooled", "crops": 1, "short_side": 16, "crop": 16},
        **{"reader": "decord", "precision": "float32", "dtype": "float32", "format": "npy"},
    }
    return FeatureSettings(**{**plain, **values})


def run_features(checkpoint: Path, output: Path, *words, source: Path | None = None) -> int:
    """Runs `python -m train.features` into a folder; its status."""
    machine = [*suite.MACHINE, "--kernels", "reference"]
    given = ["--checkpoint", source or checkpoint, "--output", output, *words, *machine]
    return features.main(list(map(str, given)))


def stored(folder: Path) -> dict[str, np.ndarray]:
    """What the npy files of a folder hold, by their names."""
    return {str(path.relative_to(folder)): np.load(path) for path in folder.rglob("*.npy")}


def only(folder: Path) -> np.ndarray:
    """What the one npy file of a folder holds."""
    (array,) = stored(folder).values()
    return array


@pytest.fixture(autouse=True)
def one_thread():
    with suite.one_thread():
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return write_videos(tmp_path_factory.mktemp("grey"))


@pytest.fixture(scope="module")
def twenty(videos) -> Path:
    return videos / "b" / "twenty.mp4"


@pytest.fixture(scope="module")
def extract(tmp_path_factory):
    """Runs the command into a folder; its status."""
    return partial(run_features, write_checkpoint(tmp_path_factory.mktemp("trained") / "last.pt"))
