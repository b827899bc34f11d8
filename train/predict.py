"""`python -m train.predict VIDEO_OR_FOLDER... --checkpoint C`: the likeliest classes of videos."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from errno import EISDIR
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from model.weights.files import shown, write_atomically
from train.allocator import set_allocator
from train.data import DataSettings, read_test_clips, sample_test_clips
from train.evaluate import REFUSALS, add_trained_options, tested_recipe, view_logits
from train.given import Given, check_names, given_videos
from train.lists import read_class_names
from train.metrics import video_scores
from train.partial import check_writable, write_text
from train.precision import PRECISIONS, casting
from train.recipe import Recipe, add_machine_options, count
from train.trained import Trained, load_trained, names_of
from train.video import VideoError, open_video
from videoswin_kernels import explain

# Classes on a contact sheet.
_SHEET_TOP = 5

T = TypeVar("T")


@dataclass(frozen=True)
class Prediction:
    """What a model made of a video.

    Attributes:
        video: which.
        num_frames, fps: its length in frames, and frames/s, 0 where the file does not tell.
        frames: int64 [clips, T], numbers of the frames that were looked at.
        scores: float32 [classes], probabilities averaged over views; NaN where a logit of any view
            is NaN or infinite.
        clip: uint8 [3, T, H, W], the middle clip in its centre crop, as the model saw it.
    """

    video: Given
    num_frames: int
    fps: float
    frames: np.ndarray
    scores: Tensor
    clip: Tensor

    @property
    def shown_frames(self) -> np.ndarray:
        """The frame numbers of `clip`, int64 [T]."""
        return self.frames[len(self.frames) // 2]

    def top(self, k: int, classes: Sequence[str]) -> list[dict[str, Any]]:
        """The `k` likeliest classes, or all of fewer: label, name and probability."""
        best = self.scores.cpu().topk(min(k, len(classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"label": n, "name": classes[n], "probability": share} for n, share in pairs]


def predictions(
    model: nn.Module,
    videos: Iterable[Given],
    recipe: Recipe,
    device: torch.device,
    precision: str = "float32",
) -> Iterator[Prediction | VideoError]:
    """What the model, in eval mode, makes of each video, or why it could not be read, in order.

    The next video is read before an answer is given: a GPU computes meanwhile.
    """

    def predict(video: Given) -> Prediction | VideoError:
        try:
            found = _read(video, recipe.data)
        except VideoError as error:
            return error
        num_frames, fps, frames, clips = found
        with torch.inference_mode(), casting(device, precision):
            logits = view_logits(model, clips[None].to(device), recipe.loop.views_per_pass)
            # Minus infinity would be a plain zero of the softmax.
            scores = video_scores(logits)[0].where(logits.isfinite().all(), torch.nan)
        # The views of a crop follow each other, and the centre comes last.
        middle = len(clips) - len(frames) + len(frames) // 2
        return Prediction(video, num_frames, fps, frames, scores, clips[middle].clone())

    return one_behind(map(predict, videos))


def _read(video: Given, data: DataSettings) -> tuple[int, float, np.ndarray, Tensor]:
    """Frames, frames/s, the sampled ones int64 [clips, T], and views; raises VideoError."""
    opened = open_video(video.path, data.reader)
    frames = sample_test_clips(opened.num_frames, data, data.test_clips)
    return opened.num_frames, opened.fps, frames, read_test_clips(opened, data)


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """Each item, once the one after it has been made."""
    held: list[T] = []
    for item in items:
        yield from held
        held = [item]
    yield from held


def table(prediction: Prediction, top: int, classes: Sequence[str]) -> str:
    """The path of a video, and a line for each of its likeliest classes."""
    lines = [
        f"  {rank}. {each['name']:<40} {each['probability']:>7.2%}"
        for rank, each in enumerate(prediction.top(top, classes), start=1)
    ]
    return "\n".join([shown(prediction.video.path), *lines])


def error_of(result: Prediction | VideoError, precision: str) -> str | None:
    """Why there is no answer for a video, None where there is one."""
    if isinstance(result, VideoError):
        return result.reason
    if result.scores.isfinite().all():
        return None
    return f"its scores are NaN or infinite at --precision {precision}"


def as_json(prediction: Prediction, top: int, classes: Sequence[str]) -> dict[str, Any]:
    """What is known of a video, in what JSON has."""
    return {
        "video": prediction.video.path,
        "num_frames": prediction.num_frames,
        "fps": prediction.fps,
        "frames": prediction.frames.tolist(),
        "top": prediction.top(top, classes),
    }


def draw(prediction: Prediction, classes: Sequence[str], folder: Path) -> None:
    """Writes the contact sheet of a video below `folder`; raises OSError."""
    # Imported here: no other use needs a library for pictures.
    from train.contact_sheet import contact_sheet

    frames, top = prediction.frames, prediction.top(_SHEET_TOP, classes)
    seconds = f", {prediction.num_frames / prediction.fps:.1f} s" if prediction.fps else ""
    clip = f"clip {len(frames) // 2 + 1} of {len(frames)}, centre crop"
    sheet = contact_sheet(
        prediction.clip,
        prediction.shown_frames.tolist(),
        prediction.fps,
        title=prediction.video.name,
        note=f"{prediction.num_frames} frames{seconds}; {clip}",
        bars=[(each["name"], each["probability"]) for each in top],
    )
    path = _sheet(folder, prediction.video)
    write_atomically(path, lambda file: sheet.save(file, format="png"))


def _sheet(folder: Path, video: Given) -> Path:
    return folder / f"{video.name}.png"


def main(arguments: list[str] | None = None) -> int:
    """Predict as the command line says; the exit status: 0 all read, 1 one was not, or refused."""
    parser = argparse.ArgumentParser(
        prog="python -m train.predict",
        description="Name the likeliest classes of videos: files, all below folders, and those of "
        "lists (.txt, a path a line).",
        epilog="Fields of the recipe that say how videos are read, and how much at a time, can be "
        "set: --data.test-clips=1 --data.test-crops=1 --data.reader=pyav ...",
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO_OR_FOLDER")
    add_trained_options(parser)
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="names for weights without any, one a line"
    )
    parser.add_argument("--top", type=count, default=5, metavar="K", help="classes shown (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that is known of them")
    parser.add_argument(
        "--sheet", type=Path, metavar="DIR", help="a picture a video: what was seen, and the top 5"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    add_machine_options(parser)
    options, overrides = parser.parse_known_args(arguments)
    if options.checkpoint is None:
        parser.error("--checkpoint is needed")
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        print(
            f"predict: must be started as one process, got {world} of torchrun: "
            "start it once for each part of the videos",
            file=sys.stderr,
        )
        return 1
    set_allocator(options.allocator)
    device = torch.device(options.device)
    try:
        videos = given_videos(options.videos)
        if options.sheet:
            check_names(videos)
        trained = load_trained(options.checkpoint, options.kernels, device, options.recipe)
        recipe = tested_recipe(trained.recipe, overrides, parser)
        trained = _named(trained, recipe, options.classes)
        explain(trained.model)
        return _predict(trained, recipe, videos, options, device)
    except REFUSALS as error:
        print(error, file=sys.stderr)
    except OSError as error:
        where = error.filename or options.json or options.checkpoint
        print(f"{where}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
    return 1


def _named(trained: Trained, recipe: Recipe, path: Path | None) -> Trained:
    """With the class names of a file, or, where weights have none, of the recipe's data set."""
    if path is not None:
        return trained.named(read_class_names(path), path)
    if trained.has_names:
        return trained
    path = Path(recipe.data.root, recipe.data.class_names)
    return trained.named(names_of(path), path)


def _predict(
    trained: Trained,
    recipe: Recipe,
    videos: list[Given],
    options: argparse.Namespace,
    device: torch.device,
) -> int:
    """Tells of each video as soon as it is known, and writes what was asked for.

    What is known is written to the JSON file, too, where anything ends the run before its end.
    """
    if options.sheet:
        check_writable(options.sheet)
    if options.json:
        check_writable(options.json.parent)
        if options.json.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(options.json))
    classes, told, failed = trained.classes, [], Counter()
    found = predictions(trained.model, videos, recipe, device, options.precision)
    try:
        for video, result in zip(videos, found, strict=True):
            if reason := error_of(result, options.precision):
                unread = isinstance(result, VideoError)
                print(result if unread else f"{shown(video.path)}: {reason}", file=sys.stderr)
                failed["could not be read" if unread else "have no finite scores"] += 1
                told.append({"video": video.path, "error": reason})
                continue
            told.append(as_json(result, options.top, classes))
            print(table(result, options.top, classes), flush=True)
            if options.sheet:
                try:
                    draw(result, classes, options.sheet)
                except OSError as error:
                    path = _sheet(options.sheet, video)
                    print(f"{path}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
                    failed["have no sheet"] += 1
    finally:
        if options.json:
            _write_json(told, len(videos), recipe, options)
    if len(videos) > 1:
        for words, count_of in failed.items():
            print(f"{count_of} of {len(videos)} videos {words}")
    return int(bool(failed))


def _write_json(
    told: list[dict[str, Any]], num_videos: int, recipe: Recipe, options: argparse.Namespace
) -> None:
    """Writes what was asked for, and what is known of each video, a line each; raises OSError."""
    data = recipe.data
    asked = {
        "checkpoint": str(options.checkpoint),
        "recipe": options.recipe,
        "reader": data.reader,
        "precision": options.precision,
        # As many of any video.
        "views": {
            "clips": len(sample_test_clips(1, data, data.test_clips)),
            "crops": data.test_crops,
        },
        "complete": len(told) == num_videos,
    }
    # The numbers of a video's frames are many.
    lines = ",\n".join(map(json.dumps, told))
    text = f'{json.dumps(asked)[:-1]}, "videos": [\n{lines}\n]}}\n'
    write_text(options.json, text)


if __name__ == "__main__":
    sys.exit(main())
