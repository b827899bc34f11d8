"""Refuses a tag that does not name the version it is put on.

    python .ci/tag.py v0.1.0

The version of the package, the first section of CHANGELOG.md with the day of the release, and
CITATION.cff have to agree. Ends with status 1 and a sentence for each that does not.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def first(pattern: str, name: str) -> str | None:
    """What the group of a pattern is in a file, where it first is; None if it is nowhere."""
    found = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    return found and found[1]


def mistakes(tag: str) -> list[str]:
    """A sentence for each place that does not say what the tag does."""
    said = []
    version = first(r'^__version__ = "(.+)"$', "videoswin_kernels/__init__.py")
    if tag != f"v{version}":
        said.append(f"videoswin_kernels.__version__ is {version}, and so its tag v{version}")
    section = first(r"^## (.+)$", "CHANGELOG.md") or "none"
    day = re.fullmatch(rf"{re.escape(str(version))} \((\d{{4}}-\d\d-\d\d)\)", section)
    if day is None:
        said.append(
            f"the first section of CHANGELOG.md must be '{version} (YYYY-MM-DD)', got '{section}'"
        )
    cited = first(r"^version: (.+)$", "CITATION.cff")
    if cited != version:
        said.append(f"the version of CITATION.cff must be {version}, got {cited}")
    released = first(r"^date-released: (.+)$", "CITATION.cff")
    if day is not None and released != day[1]:
        said.append(f"date-released of CITATION.cff must be {day[1]}, got {released}")
    return said


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python .ci/tag.py TAG")
    found = mistakes(sys.argv[1])
    for sentence in found:
        print(f"{sys.argv[1]}: {sentence}", file=sys.stderr)
    raise SystemExit(bool(found))
