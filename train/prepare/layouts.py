"""Lists of videos, made of how data sets lie on disk and of their official annotations.

Everything is sorted, so that equal folders give equal lists. What is listed by an annotation and is
not on disk is missing, and no error: of every large set some videos are.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from train.lists import SUFFIXES, Listed, ListError
from train.prepare.found import Found, shown, why_unlistable

# The first of these that has labelled videos is the test split; that of Kinetics is `val`.
_TEST_FOLDERS = ("test", "val", "validate", "validation")


@dataclass
class Lists:
    """What a data set has.

    Attributes:
        classes: names, by label.
        train, test: videos that are on disk.
        missing: `split name` of each video that an annotation names and that is not on disk.
        skipped: path and reason of each that is on disk and cannot be listed.
    """

    classes: list[str]
    train: list[Listed] = field(default_factory=list)
    test: list[Listed] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def empty_classes(self, split: str) -> list[str]:
        """Names of the classes without videos in "train" or "test"."""
        labels = {listed.label for listed in getattr(self, split)}
        return [name for label, name in enumerate(self.classes) if label not in labels]


def of_folders(root: Path, found: Found, test_share: float, seed: int) -> Lists:
    """The lists of a folder a class, in folders `train` and `test` (or `val`), or without those.

    A folder `test` without a video in the folder of a class, as of those whose labels are kept
    secret, is none. Without both a share of each class is for testing, and at least one of two
    videos or more.

    Raises:
        ListError: there is no video, or a train folder alone.
    """
    tests = [name for name in _TEST_FOLDERS if (root / name).is_dir()]
    has_splits = (root / "train").is_dir() and bool(tests)
    labelled = {name.partition("/")[0] for name in found.frames if name.count("/") > 1}
    test_folder = next((name for name in tests if name in labelled), None)
    if has_splits and test_folder is None:
        raise ListError(
            f"{root}: there is no video in the folder of a class of {' or '.join(tests)}"
        )
    videos: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    skipped = list(found.skipped)
    for name in found.frames:
        parts = name.split("/")
        split = "train"
        if has_splits:
            split = {"train": "train", test_folder: "test"}.get(parts.pop(0))
        if split is None or len(parts) < 2:
            where = f"a folder of train or {test_folder}" if has_splits else "the folder of a class"
            skipped.append((name, f"it is not in {where}"))
        elif (reason := why_unlistable(parts[0])) is not None:
            skipped.append((name, reason))
        else:
            videos[split].setdefault(parts[0], []).append(name)
    classes = sorted({*videos["train"], *videos["test"]})
    if classes == ["train"]:
        raise ListError(
            f"{root}: there are no videos but in train; expected test or val beside it, else name "
            f"{root / 'train'} as the root, and a share of each class is for testing"
        )
    if not classes:
        raise ListError(f"{root}: there is no video in the folder of a class")
    for folder in (root / "train", root / test_folder) if has_splits else (root,):
        below = sorted(each for each in folder.iterdir() if each.is_dir())
        empty = [each for each in below if each.name not in classes and each.name[0] != "."]
        skipped += [
            (shown(str(each.relative_to(root))), "there is no video in it") for each in empty
        ]
    lists = Lists(classes, skipped=skipped)
    for label, name in enumerate(classes):
        of_class = {split: videos[split].get(name, []) for split in videos}
        if not has_splits:
            of_class = _share(of_class["train"], test_share, seed)
        for split, names in of_class.items():
            getattr(lists, split).extend(Listed(n, label, found.frames[n]) for n in names)
    return lists


def _share(names: list[str], test_share: float, seed: int) -> dict[str, list[str]]:
    """`names` as "train" and "test", decided for each by its own name and the seed alone.

    So no video changes sides when others are added, but the only one of a class that had to be
    chosen for want of another. Neither does it when it is re-encoded: the suffix does not count.
    """

    def place(name: str) -> float:
        # macOS writes the same name with other code points.
        name = unicodedata.normalize("NFC", _without_suffix(name))
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    places = {name: place(name) for name in names}
    test = {name for name in names if places[name] < test_share}
    if len(names) > 1 and not test:
        test = {min(names, key=places.get)}
    if len(names) > 1 and len(test) == len(names):
        test -= {max(names, key=places.get)}
    return {
        "train": [name for name in names if name not in test],
        "test": [name for name in names if name in test],
    }


def of_kinetics(found: Found, annotations: Sequence[Path]) -> Lists:
    """The lists of Kinetics' CSV files: label,youtube_id,time_start,time_end,split.

    The videos are called `ID_SSSSSS_EEEEEE`, in any folder. The test list is of the validation
    rows, and of the test rows where there are none of those.

    Raises:
        ListError: a file that is not as released, or no video of theirs is on disk.
    """
    paths = []
    for path in annotations:
        inside = sorted(each for each in path.glob("*.csv") if _last_word(each) in _KINETICS_SPLITS)
        if path.is_dir() and not inside:
            raise ListError(f"{path}: there is no train.csv or val.csv in it")
        paths += inside if path.is_dir() else [path]
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for path in paths:
        for split, name, label in _kinetics_rows(path):
            rows[split].append((name, label))
    test = rows["val"] or rows["test"]
    if not rows["train"] or not test:
        raise ListError(
            f"{' '.join(map(str, annotations))}: expected rows with labels of train and of val or "
            f"test, got {len(rows['train'])} and {len(test)}"
        )
    classes = sorted({label for of_split in (rows["train"], test) for _, label in of_split})
    labels = {name: label for label, name in enumerate(classes)}
    lists = Lists(classes, skipped=list(found.skipped))
    named = {
        split: [(name, labels[label]) for name, label in of_split]
        for split, of_split in (("train", rows["train"]), ("test", test))
    }
    _fill(lists, found, named)
    return lists


_KINETICS_SPLITS = {"train": "train", "test": "test"}
_KINETICS_SPLITS |= dict.fromkeys(("val", "validate", "validation"), "val")


def _last_word(path: Path) -> str:
    """Of the name of a file: `train` of both train.csv and kinetics_train.csv."""
    return re.split(r"[\W\d_]+", path.stem.lower())[-1]


def _kinetics_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """The split ("train", "val" or "test"), name and label of each row that has a label."""
    reader = csv.DictReader(read_text(path).splitlines())
    needed = ("youtube_id", "time_start", "time_end")
    if not set(needed) <= set(reader.fieldnames or ()):
        raise ListError(
            f"{path}: expected a first line label,youtube_id,time_start,time_end,split, "
            f"got {','.join(reader.fieldnames or ())!r}"
        )
    for row in reader:
        if not row.get("label"):
            continue
        split = _KINETICS_SPLITS.get(row.get("split") or _last_word(path))
        try:
            start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
        except (TypeError, ValueError):
            split = None
        if split is None:
            raise ListError(
                f"{path}:{reader.line_num}: expected two times in seconds and the split train, "
                f"val or test, got {','.join(map(str, row.values()))!r}"
            )
        yield split, f"{row['youtube_id']}_{start:06}_{end:06}", row["label"]


def of_sthv2(found: Found, annotations: Path) -> Lists:
    """The lists of Something-Something V2's JSON files; the videos are called by their number.

    Raises:
        ListError: a file that is not as released, or no video of theirs is on disk.
    """
    ids = _read_json(annotations, "labels", dict)
    if {str(label) for label in ids.values()} != {str(label) for label in range(len(ids))}:
        raise ListError(f"{annotations}: the labels must be numbered from 0 without gaps")
    classes = sorted(ids, key=lambda name: int(ids[name]))
    labels = {name: label for label, name in enumerate(classes)}
    named: dict[str, list[tuple[str, int]]] = {}
    for split, word in (("train", "train"), ("test", "validation")):
        named[split] = []
        for entry in _read_json(annotations, word, list):
            if not isinstance(entry, dict):
                raise ListError(f"{annotations}: {word} must list objects, got {entry!r}")
            # "Putting [something] on [something]" is the class "Putting something on something".
            name = str(entry.get("template", "")).replace("[", "").replace("]", "")
            if name not in labels or "id" not in entry:
                raise ListError(
                    f"{annotations}: {word} has the video {entry.get('id')!r} of the template "
                    f"{name!r}, which is none of the {len(labels)} labels"
                )
            named[split].append((str(entry["id"]), labels[name]))
    lists = Lists(classes, skipped=list(found.skipped))
    _fill(lists, found, named)
    return lists


def _read_json(folder: Path, word: str, kind: type) -> Any:
    names = (f"something-something-v2-{word}.json", f"{word}.json")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise ListError(f"{folder}: expected {names[0]} or {names[1]}, there is neither")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise ListError(f"{path}: not JSON, {error}") from None
    if not isinstance(content, kind):
        raise ListError(f"{path}: expected a JSON {kind.__name__}, got {type(content).__name__}")
    return content


def of_ucf(found: Found, annotations: Path, split: int) -> Lists:
    """The lists of one of the three official splits of UCF101: classInd, trainlist0N, testlist0N.

    Raises:
        ListError: a file that is not as released, or no video of theirs is on disk.
    """
    numbers = {}
    for number, name in _words(annotations / "classInd.txt", _is_class):
        numbers[name] = int(number)
    classes = sorted(numbers, key=numbers.get)
    if [numbers[name] for name in classes] != list(range(1, len(classes) + 1)):
        raise ListError(f"{annotations / 'classInd.txt'}: expected numbers from 1 without gaps")
    named: dict[str, list[tuple[str, int]]] = {}
    for key in ("train", "test"):
        path = annotations / f"{key}list0{split}.txt"
        named[key] = []
        for name, *_ in _words(path, lambda words: words[0].partition("/")[0] in numbers):
            named[key].append((_without_suffix(name), numbers[name.partition("/")[0]] - 1))
    lists = Lists(classes, skipped=list(found.skipped))
    _fill(lists, found, named)
    return lists


def _is_class(words: list[str]) -> bool:
    return len(words) == 2 and words[0].isdecimal()


def _words(path: Path, is_right: Callable[[list[str]], bool]) -> Iterator[list[str]]:
    """The words of each line that has any, if they are right."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if words and not is_right(words):
            raise ListError(f"{path}:{number}: not as released with UCF101: {line!r}")
        if words:
            yield words


def _fill(lists: Lists, found: Found, named: dict[str, list[tuple[str, int]]]) -> None:
    """Put the videos that annotations name, without suffix, into `lists`, or among its missing."""
    by_stem = defaultdict(list)
    for name in found.frames:
        by_stem[_without_suffix(name).rpartition("/")[2]].append(name)
    for split, videos in named.items():
        folders = ("train",) if split == "train" else _TEST_FOLDERS
        chosen = []
        for wanted, label in dict(videos).items():
            candidates = by_stem.get(wanted.rpartition("/")[2], [])
            if not candidates:
                lists.missing.append(f"{split} {wanted}")
                continue
            # Of several the one in the folder of its split; they are sorted.
            name = next((n for n in candidates if n.partition("/")[0] in folders), candidates[0])
            chosen.append(Listed(name, label, found.frames[name]))
        getattr(lists, split).extend(sorted(chosen))
    if not lists.train and not lists.test:
        wanted = lists.missing[0].partition(" ")[2]
        raise ListError(
            f"none of the {len(lists.missing)} videos of the annotations is below the root, "
            f"where a file like {wanted}.mp4 was expected"
        )


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; raises ListError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ListError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise ListError(f"{path}: must be UTF-8 text, got byte {error.start} in another") from None


def _without_suffix(name: str) -> str:
    """A path without the suffix of a video; other dots are part of a name."""
    suffix = PurePosixPath(name).suffix
    return name[: -len(suffix)] if suffix.lower() in SUFFIXES else name
