"""Videos read with decord.

What decord 0.6 does with damaged files, found by experiment (x86-64 Linux, 2 cores):

* An mp4 whose index (``moov``) comes first and whose data are cut opens as if nothing were
  missing; reading beyond the cut fails, reading before it succeeds. A cut avi, mkv or webm opens
  as a shorter video and reads without a word. So the size the container declares is compared with
  the size of the file before decord sees it (`video.declared_bytes`).
* A packet without a picture is answered with the frame before it; ``fault_tol`` makes that an
  error where decord notices. Bits flipped inside a picture are concealed by FFmpeg and read as
  wrong pixels: nothing short of a checksum would find those.
* ``DECORD_EOF_RETRY_MAX`` counts how often the reader polls the decoding thread after the last
  packet was handed over. Low limits (16 to 256 here) fail on intact files as soon as the
  cores are busy, and no damaged file of ours came near decord's own limit of 10240: the limit is
  left alone.
* Three kinds of intact files are refused: MPEG transport streams as FFmpeg writes them, videos with
  a rotation in their metadata (phones held upright) and very narrow ones (48 pixels, say, where
  FFmpeg pads the rows): for the last two decord prepares batches of the wrong size. Re-encode them,
  or read them with PyAV.

And it gives other frames than those asked for, without a word, of some intact files, once it has
gone to a key frame: two or three frames later where GOPs are open (x265's default; H.264 with
``open-gop=1``) or an avi or MPEG program stream has B-frames, anything where H.264 is refreshed
part by part. Frames read from the first on are right. Read such videos with PyAV.

decord decodes in a thread of its own, which a fork does not copy. Forking while videos are open is
safe: the child cannot read them, and does not free them.
"""

import io
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import decord
import numpy as np

from train.video import Video, VideoError

# Its own complaints would only repeat, at length and on stderr, what VideoError says.
decord.logging.set_level(decord.logging.QUIET)

# decord turns a share of the frames below 1 into a number of tolerated repeats, here always 0;
# a plain 0 would switch the check off.
_NO_REPEATED_FRAMES = 1e-9

# Open decord readers of this process.
_readers = weakref.WeakSet()


def _forget_readers() -> None:
    """Leak, in a forked child, the readers of its parent.

    Freeing one joins its decoding thread, which a child does not have: the child is aborted, or
    waits for ever. And it may free one at any time, when it collects garbage its parent left.
    """
    for reader in list(_readers):
        reader._handle = None  # what decord's destructor asks for
    _readers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_readers)


class Reader(Video):
    """A video that decord decodes."""

    def __init__(self, path: str, data: bytes | None, num_threads: int):
        """Open the file at `path`, or `data` if there are some; raises VideoError."""
        self.path = path
        self._data, self._num_threads = data, num_threads
        self._reader = self._open()
        super().__init__(path, len(self._reader), float(self._reader.get_avg_fps()))

    def _decode(self, unique: np.ndarray) -> np.ndarray:
        """Return the frames at `unique`, which ascends, uint8 [len(unique), H, W, 3]."""
        try:
            return self._reader.get_batch(unique).asnumpy()
        except Exception as error:
            # decord's message is a C++ stack trace, and its failed reader gives no more frames.
            if "size must exactly match" in str(error):
                reason = (
                    "decord cannot read it (a rotation, or very narrow): re-encode it upright, "
                    "or use reader 'pyav'"
                )
            else:
                reason = self._undecodable(unique)
            self._reader = self._open()
            raise VideoError(self.path, reason) from None

    def keys(self) -> list[int]:
        """Return the numbers of the key frames as decord counts them: wrong where GOPs are open."""
        return self._reader.get_key_indices()

    def _open(self) -> decord.VideoReader:
        """Return a fresh decord reader."""
        # An absolute path, or FFmpeg would take what stands before a colon for a protocol.
        source = os.path.abspath(self.path) if self._data is None else io.BytesIO(self._data)
        try:
            with _silent_stderr():
                reader = decord.VideoReader(
                    source,
                    ctx=decord.cpu(0),
                    num_threads=self._num_threads,
                    fault_tol=_NO_REPEATED_FRAMES,
                )
        except UnicodeEncodeError:
            reason = "decord opens no name that is not UTF-8: rename it, or use reader 'pyav'"
            raise VideoError(self.path, reason) from None
        except Exception as error:
            if "cannot find video stream" in str(error):
                raise VideoError(self.path, "there is no video stream in the file") from None
            raise VideoError(self.path, "not a video decord can open") from None
        _readers.add(reader)
        return reader

    def _undecodable(self, unique: np.ndarray) -> str:
        """Return which of the sorted frames `unique` fails first, as a reason.

        "At or soon after", because decord decodes ahead of the frame it is asked for.
        """
        reader = self._open()
        for index in unique:
            try:
                reader.get_batch([index])
            except Exception:
                return f"decoding failed at or soon after frame {index} of {self.num_frames}"
        return "the frames asked for could not be decoded together"


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what is written to file descriptor 2: decord reports what it cannot open there.

    Its log level does not reach that line. Python's own errors are raised, not written.
    """
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
