"""`python -m videoswin_kernels`: what each word of `kernels=` runs on this machine, or why not.

With `--support`, the page of what is supported, which is the same on every machine.
"""

from __future__ import annotations

import argparse
import platform

import torch

from videoswin_kernels import __version__, extension, support
from videoswin_kernels.selection import (
    OPERATORS,
    TABLE,
    WORDS,
    Call,
    UnavailableError,
    choose,
    device_types,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m videoswin_kernels",
        description="What each word of kernels= runs on this machine, or why not.",
    )
    about = "print docs/support.md instead: what is supported, and what has been proven of it"
    parser.add_argument("--support", action="store_true", help=about)
    if parser.parse_args().support:
        print(support.page(), end="")
        return
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"videoswin_kernels {__version__}, {versions}")
    refusals: dict[str, str] = {}
    types = device_types()
    for device_type in types:
        name = torch.cuda.get_device_name() if device_type == "cuda" else platform.machine()
        print(f"\non {device_type} ({name}{_level(device_type)})")
        print("".join(f"{column:<18}" for column in ("", *WORDS)).rstrip())
        for operator in OPERATORS:
            cells = [_cell(operator, word, device_type, refusals) for word in WORDS]
            print("".join(f"{cell:<18}" for cell in (operator, *cells)).rstrip())
    if any(
        len(TABLE[device_type][operator]) > 1 for device_type in types for operator in OPERATORS
    ):
        print("\n* unmeasured: no bench row has earned this place yet")
    print()
    for word, reason in refusals.items():
        print(f"{word} is refused: {reason}")


def _level(device_type: str) -> str:
    """Which of the kernels for processors run: those of a level of x86-64."""
    if device_type != "cpu" or extension.why_not("_ops_cpu") is not None:
        return ""
    return f", C++ kernels of level {extension.cpu_level()}"


def _cell(operator: str, word: str, device_type: str, refusals: dict[str, str]) -> str:
    try:
        choice = choose(Call(operator, device_type), word)
    except UnavailableError as error:
        refusals[word] = str(error).partition("cannot run: ")[2]
        return "-"
    had_rivals = word in ("auto", "fused") and len(TABLE[device_type][operator]) > 1
    return f"{choice.kernels} *" if had_rivals and choice.row is None else choice.kernels


if __name__ == "__main__":
    main()
