"""`python -m model.weights FILE`: says what weights are in a file, and writes them otherwise."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from model.variants import VARIANTS
from model.weights.catalogue import CATALOGUE
from model.weights.download import destination, read
from model.weights.files import FORMAT, SUFFIXES, WeightsError, write_file
from model.weights.fitting import spell
from model.weights.formats import (
    INDEX,
    MASK,
    PATCHES,
    TABLE,
    Recognised,
    recognise,
    stored_windows,
    to_official,
    to_torchvision,
)
from model.weights.inflation import square_window
from videoswin_kernels.geometry import Triple, table_rows


def describe(found: Recognised, source: str) -> dict[str, str]:
    """What the weights are of, in words: format, variant, sizes, classes, parameters, dtype.

    Raises:
        WeightsError: they lack the entries that tell.
    """
    tensors = {
        name: value
        for name, value in (found.state | found.unused).items()
        if isinstance(value, Tensor) and not name.endswith(MASK)
    }
    tables = {}
    for name, value in tensors.items():
        place = re.match(rf"backbone\.layers\.(\d+)\.blocks\.(\d+)\.attn\.{TABLE}$", name)
        if place and value.ndim == 2 and len(value):
            tables[int(place[1]), int(place[2])] = value
    patches = tensors.get(PATCHES)
    if patches is None or patches.ndim not in (4, 5) or not tables:
        raise WeightsError(f"load_weights: {source} has no patch embedding, or no bias tables")
    # The 2-D head has its name in the file.
    heads = [v for n, v in tensors.items() if re.search(r"(^|\.)(head|fc_cls)\.weight$", n)]
    head = next((value for value in heads if value.ndim == 2), None)
    depths = Counter(stage for stage, _ in tables)
    num_heads = {stage: table.shape[1] for (stage, _), table in tables.items()}
    shape = {
        "embed_dim": len(patches),
        "depths": tuple(depths[stage] for stage in sorted(depths)),
        "num_heads": tuple(num_heads[stage] for stage in sorted(depths)),
    }
    table = next(iter(tables.values()))
    windows = stored_windows(found)
    is_2d = found.format == "imagenet"
    variants = [
        name
        for name, sizes in VARIANTS.items()
        if all(sizes[key] == value for key, value in shape.items())
        and (is_2d or _has_sizes(sizes, tuple(patches.shape[2:]), windows, len(table)))
    ]
    if is_2d:
        extent = square_window(table)
        window = f"{extent}x{extent}" if extent else "not square"
    elif windows:
        window = spell(windows[0])
    elif variants:
        window = f"{spell(VARIANTS[variants[0]]['window_size'])}, by the length of the tables"
    else:
        window = f"not stored; the tables have {len(table)} rows"
    return {
        "format": f"{found.format}{', 2-D' * is_2d}",
        "variant": ", ".join(variants) or "none of the released",
        "channels": str(shape["embed_dim"]),
        "depths": spell(shape["depths"], "-"),
        "heads": spell(shape["num_heads"], "-"),
        "window": window,
        "patch": spell(patches.shape[2:]),
        "classes": "no head" if head is None else str(len(head)),
        "parameters": f"{sum(value.numel() for value in tensors.values()):,}",
        "dtype": ", ".join(sorted({str(value.dtype)[6:] for value in tensors.values()})),
    }


def _has_sizes(
    sizes: Mapping[str, Any], patch: tuple[int, ...], windows: Sequence[Triple], rows: int
) -> bool:
    """Whether a variant has these patches, and one of these windows or tables of this length."""
    window = sizes["window_size"]
    if sizes["patch_size"] != patch or table_rows(window) != rows:
        return False
    return not windows or window in windows


def convert(content: Mapping[str, Any], to: str, window: Triple | None) -> dict[str, Any]:
    """What `write_file` writes so that the weights in `content` are in another format.

    Args:
        content: weights of a 3-D model, as `read_file` gives them.
        to: "official", "torchvision" or "own".
        window: their window, if they do not tell it.

    Raises:
        WeightsError: they are 2-D, or damaged.
        ValueError: their window is not known, or another one.
    """
    if to == "torchvision":
        return to_torchvision(content, window)
    weights = to_official(content, window)
    if to == "official":
        return {"meta": {}, "state_dict": weights}
    window = window or stored_windows(recognise(content, "the file"))[0]
    state = {name: value for name, value in weights.items() if not name.endswith(INDEX)}
    return {"format": FORMAT, "window_size": list(window), "model": state}


def main(arguments: list[str] | None = None) -> int:
    """Inspect or convert as the command line says; the exit status: 0, or 1 for unusable files."""
    parser = argparse.ArgumentParser(
        prog="python -m model.weights", description="Say what weights a file holds; convert them."
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="path or URL")
    parser.add_argument("--to", choices=("official", "torchvision", "own"))
    parser.add_argument("--output", type=Path, metavar="OUT", help=f"ends in {' '.join(SUFFIXES)}")
    parser.add_argument(
        "--window", type=int, nargs=3, metavar=("D", "H", "W"), help="where the file has none"
    )
    parser.add_argument("--list", action="store_true", help="the released weights, by name")
    options = parser.parse_args(arguments)
    if (options.file is None) != options.list or (options.to is None) != (options.output is None):
        parser.error("give FILE, or FILE with --to and --output, or --list")
    if options.window and options.to is None:
        parser.error("--window belongs to --to")
    if options.list:
        for variant, names in CATALOGUE.items():
            for name, url in names.items():
                print(f"{variant:<14}{name:<22}{url}\n{'':36}{destination(url)}")
        return 0
    try:
        if options.output is not None and options.output.exists():
            raise WeightsError(f"{options.output} exists; remove it or name another --output")
        content = read(options.file)
        found = recognise(content, f"load_weights: {options.file}")
        for name, value in describe(found, options.file).items():
            print(f"{name:<12}{value}")
        if options.to is not None:
            window = tuple(options.window) if options.window else None
            write_file(options.output, convert(content, options.to, window))
            print(f"{'written':<12}{options.output}")
    except (WeightsError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
