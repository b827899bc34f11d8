"""A picture of what a model saw of a video and what it made of it: frames, and bars beside them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# All in pixels.
CELL, CAPTION, GAP, COLUMNS = 128, 20, 8, 8
MARGIN, HEADER, PANEL = 20, 64, 360
MOST_FRAMES = 32

_INK, _FAINT, _BAR, _REST, _PAPER = "#1b1f24", "#5b6470", "#2f6fb0", "#e4e8ed", "#ffffff"


def contact_sheet(
    clip: Tensor,
    frames: Sequence[int],
    fps: float,
    *,
    title: str,
    note: str,
    bars: Sequence[tuple[str, float]],
) -> Image.Image:
    """A sheet of the frames of a clip, in rows of 8, with their numbers and times, and of `bars`.

    Args:
        clip: uint8 [3, T, H, W]; of more than 32 frames as many are shown, evenly spread.
        frames: their numbers in the video.
        fps: frames/s, which makes times of them; 0 leaves the times out.
        title, note: the two lines above.
        bars: names and probabilities, 0 to 1, the likeliest first.
    """
    chosen = chosen_frames(len(frames))
    height = max(1, round(CELL * clip.shape[2] / clip.shape[3]))
    boxes = cell_boxes(len(chosen), height)
    grid_right = max(left for left, _ in boxes) + CELL
    grid_bottom = boxes[-1][1] + height + CAPTION
    rows = [(_wrapped(name, 16, PANEL, 2), share) for name, share in bars]
    bars_bottom = HEADER + MARGIN + sum(22 * len(lines) + 36 for lines, _ in rows)
    size = (grid_right + MARGIN + PANEL + MARGIN, max(grid_bottom, bars_bottom) + MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    room = size[0] - 2 * MARGIN
    _write(pen, (MARGIN, 16), _fitted(title, 18, room, keep_end=True), 18, _INK)
    _write(pen, (MARGIN, 42), _fitted(note, 13, room), 13, _FAINT)
    for (left, top), index in zip(boxes, chosen, strict=True):
        picture = Image.fromarray(np.ascontiguousarray(clip[:, index].permute(1, 2, 0).numpy()))
        # Few pixels are shown as such, many are averaged.
        how = Image.Resampling.NEAREST if picture.width < CELL else Image.Resampling.BOX
        sheet.paste(picture.resize((CELL, height), how), (left, top))
        seconds = f"  {frames[index] / fps:.2f} s" if fps else ""
        caption = _fitted(f"{frames[index]}{seconds}", 13, CELL)
        _write(pen, (left, top + height + 2), caption, 13, _FAINT)
    left, top = grid_right + MARGIN, HEADER + MARGIN
    for lines, share in rows:
        for line in lines:
            _write(pen, (left, top), line, 16, _INK)
            top += 22
        width = PANEL - 64
        pen.rectangle((left, top + 2, left + width, top + 16), fill=_REST)
        if round(width * share):
            pen.rectangle((left, top + 2, left + round(width * share), top + 16), fill=_BAR)
        _write(pen, (left + PANEL, top), f"{share:.1%}", 14, _INK, anchor="ra")
        top += 36
    return sheet


def chosen_frames(num_frames: int) -> list[int]:
    """Which frames of a clip are shown: all, or 32 from the first to the last, evenly spread."""
    return np.linspace(0, num_frames - 1, min(num_frames, MOST_FRAMES)).round().astype(int).tolist()


def cell_boxes(num_cells: int, height: int) -> list[tuple[int, int]]:
    """Left and top of each picture, for pictures of this height."""
    step = (CELL + GAP, height + CAPTION + GAP)
    places = (divmod(cell, COLUMNS) for cell in range(num_cells))
    return [(MARGIN + column * step[0], HEADER + MARGIN + row * step[1]) for row, column in places]


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, ink: str, anchor="la"
) -> None:
    pen.text(place, text, font=_font(text, size), fill=ink, anchor=anchor)


def _fitted(text: str, size: int, width: int, keep_end: bool = False) -> str:
    """`text`, cut at its end, or at its beginning, to what fits in `width`."""
    text = "".join(each if each.isprintable() else "\ufffd" for each in text)
    font = _font(text, size)
    if font.getlength(text) <= width:
        return text
    for length in range(len(text) - 1, 0, -1):
        cut = f"…{text[-length:].lstrip()}" if keep_end else f"{text[:length].rstrip()}…"
        if font.getlength(cut) <= width:
            return cut
    return "…"


def _wrapped(text: str, size: int, width: int, most: int) -> list[str]:
    """`text` in at most so many lines, broken between words where there are any."""
    font, lines = _font(text, size), []
    while len(lines) < most - 1 and font.getlength(text) > width:
        length = len(text) - 1
        while length > 1 and font.getlength(text[:length]) > width:
            length -= 1
        # A space just behind the last letter that fits is one to break at, too.
        space = text.rfind(" ", 1, length + 1)
        length = space if space > 0 else length
        lines.append(text[:length].rstrip())
        text = text[length:].lstrip()
    return [*lines, _fitted(text, size, width)]


@lru_cache(maxsize=256)
def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib has; for letters that it lacks an installed font with them."""
    return ImageFont.truetype(_font_file("".join(sorted(set(text)))), size)


@lru_cache(maxsize=256)
def _font_file(letters: str) -> str:
    # Imported here: its list of fonts takes seconds to make, once on a machine.
    import matplotlib

    usual = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    if _has(usual, letters):
        return usual
    from matplotlib.font_manager import fontManager

    others = (font.fname for font in fontManager.ttflist if font.weight in (400, "normal"))
    # Boxes stand for letters that no font has.
    return next((path for path in others if _has(path, letters)), usual)


def _has(path: str, letters: str) -> bool:
    """Whether a font has all of these letters."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return False
    return all(font.get_char_index(ord(letter)) for letter in letters)
