"""Videos stored as a folder of numbered pictures, a file a frame, read with Pillow."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from train.video import Video, VideoError


def has_number(template: str) -> bool:
    """Whether `template`, as `str.format` takes it, has a place for a number and no other."""
    try:
        return template.format(0) != template.format(1)
    except (IndexError, KeyError, ValueError, AttributeError):
        return False


class FrameFolder(Video):
    """A folder of pictures, read as a video; all of them have one size.

    A rotation in a picture's EXIF metadata is ignored: tools that write frames write them upright.

    Attributes:
        fps: 0, which no folder tells.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        num_frames: int,
        template: str = "img_{:05}.jpg",
        first: int = 1,
    ):
        """Take `num_frames` pictures of the folder `path`; none is looked at before it is read.

        Args:
            path: the folder.
            num_frames: pictures that are frames.
            template: name of a picture, with a place for its number as `str.format` has it.
            first: number of frame 0.

        Raises:
            ValueError: if `template` has no place for a number, or for something else.
            VideoError: if there is no such folder, or no frame.
        """
        if not has_number(template):
            raise ValueError(
                f"FrameFolder: template must have one place for the number of a picture, "
                f"such as 'img_{{:05}}.jpg', got {template!r}"
            )
        path = os.fspath(path)
        if not os.path.isdir(path):
            exists = os.path.lexists(path)
            raise VideoError(path, "it is no folder of pictures" if exists else "no such folder")
        super().__init__(path, num_frames, 0.0)
        self._template, self._first = template, first

    def _decode(self, unique: np.ndarray) -> np.ndarray:
        """Return the frames at `unique`, which ascends, uint8 [len(unique), H, W, 3]."""
        pictures = []
        for index in unique.tolist():
            name = self._template.format(self._first + index)
            pictures.append(self._picture(name))
            if pictures[-1].shape != pictures[0].shape:
                size, others = (f"{p.shape[0]} x {p.shape[1]}" for p in (pictures[-1], pictures[0]))
                raise VideoError(self.path, f"picture {name} has {size} pixels, others {others}")
        return np.stack(pictures)

    def _picture(self, name: str) -> np.ndarray:
        """Return a picture, RGB, uint8 [H, W, 3]; raises VideoError with its name."""
        try:
            with Image.open(Path(self.path, name)) as image:
                return np.asarray(image.convert("RGB"))
        except FileNotFoundError:
            reason = f"picture {name} is missing"
        except IsADirectoryError:
            reason = f"picture {name} is a directory"
        # Pillow's plugins raise whatever their parsing of a damaged file meets.
        except Exception:
            reason = f"picture {name} cannot be decoded, it is damaged or none"
        raise VideoError(self.path, reason)
