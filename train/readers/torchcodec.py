"""Videos read with torchcodec, which has no FFmpeg of its own and loads the machine's.

It knows the time of every packet before it answers (``seek_mode="exact"``), as `pyav` does,
and shows rotated videos upright. With FFmpeg 8.1, torchcodec 0.17 gives other frames than those
asked for, or fails, where an avi or MPEG program stream has B-frames, H.264 is refreshed part by
part, or the video is an MPEG transport stream. Read those with PyAV.
"""

import os

import numpy as np
import torch
from torchcodec.decoders import VideoDecoder

from train.video import Video, VideoError

_NOT_LOADED = "Could not load libtorchcodec"


def _check_libraries() -> None:
    """Raise ImportError if torchcodec cannot load FFmpeg, which it tries when it first decodes."""
    try:
        VideoDecoder(b"no video")
    except Exception as error:
        if _NOT_LOADED in str(error):
            raise ImportError("torchcodec finds no FFmpeg that it, and this torch, fit") from None


_check_libraries()


class Reader(Video):
    """A video that torchcodec decodes."""

    def __init__(self, path: str, data: bytes | None, num_threads: int):
        """Open the file at `path`, or `data` if there are some; raises VideoError."""
        self.path = path
        try:
            self._decoder = VideoDecoder(
                os.path.abspath(path) if data is None else data,
                dimension_order="NHWC",
                num_ffmpeg_threads=num_threads,
                seek_mode="exact",
            )
            num_frames = len(self._decoder)
        except Exception as error:
            if "best video stream is unknown" in str(error):
                raise VideoError(path, "there is no video stream in the file") from None
            raise VideoError(path, "not a video torchcodec can open") from None
        super().__init__(path, num_frames, float(self._decoder.metadata.average_fps or 0))

    def _decode(self, unique: np.ndarray) -> torch.Tensor:
        """Return the frames at `unique`, which ascends, uint8 [len(unique), H, W, 3]."""
        try:
            return self._decoder.get_frames_at(unique.tolist()).data
        except Exception:
            # Its message names lines of C++; a frame alone tells which one it was.
            raise VideoError(self.path, self._undecodable(unique)) from None

    def _undecodable(self, unique: np.ndarray) -> str:
        """Return which of the sorted frames `unique` fails first, as a reason."""
        for index in unique.tolist():
            try:
                self._decoder.get_frame_at(index)
            except Exception:
                return f"decoding failed at frame {index} of {self.num_frames}"
        return "the frames asked for could not be decoded together"
