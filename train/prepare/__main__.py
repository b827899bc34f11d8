"""`python -m train.prepare`: lists of a data set, smaller videos, an index of shards, a check."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

# The other modules are imported where they are needed: each worker imports this one.
_SHOWN = 20
_LAYOUTS = ("folders", "frames", "kinetics", "sthv2", "ucf")
_LIST_HELP = """layouts:
  folders   ROOT/train/CLASS/VIDEO and ROOT/test/CLASS/VIDEO (or val), or ROOT/CLASS/VIDEO, of which
            --test-share of each class is for testing, by name and --seed alone
  frames    as folders, with folders of images img_00001.jpg ... in place of videos
  kinetics  CSV files as released (label,youtube_id,time_start,time_end,split) in --annotations;
            videos ID_SSSSSS_EEEEEE.mp4 anywhere below ROOT
  sthv2     something-something-v2-{labels,train,validation}.json in --annotations; videos ID.webm
            (or .mp4) anywhere below ROOT
  ucf       classInd.txt, trainlist0N.txt and testlist0N.txt in --annotations; videos anywhere below

Videos of the last three that are named and not on disk are counted, and named in missing.txt. With
--frames, videos are folders of images there, too. A list of another origin with `path label` a
line, as upstream's k400_train.txt, is used as it is: --data.train-list k400_train.txt."""


def main(arguments: list[str] | None = None) -> int:
    """Prepare as the command line says; the exit status: 0 all is well, 1 it is not."""
    options = _parser().parse_args(arguments)
    from train.lists import ListError

    try:
        return options.run(options)
    except (ListError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or options.command}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from here" if "workers" in options else ""
        print(f"\nstopped{goes_on}", file=sys.stderr)
        return 130
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.prepare", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    shaped = argparse.RawDescriptionHelpFormatter
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    lists = commands.add_parser(
        "list",
        help="write train.txt, test.txt and classes.txt",
        description="Write train.txt, test.txt (`path label` a line) and classes.txt.",
        epilog=_LIST_HELP,
        formatter_class=shaped,
    )
    lists.add_argument("layout", choices=_LAYOUTS, metavar="LAYOUT", help=", ".join(_LAYOUTS))
    lists.add_argument("root", type=Path, metavar="ROOT", help="folder that paths are relative to")
    lists.add_argument("--annotations", type=Path, nargs="+", metavar="PATH", help="where they are")
    lists.add_argument("--output", type=Path, metavar="DIR", help="where lists are written (ROOT)")
    lists.add_argument("--test-share", type=float, default=0.1, help="of a class (0.1)")
    lists.add_argument("--seed", type=int, default=0, help="of the choice for testing (0)")
    lists.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="of ucf (1)")
    lists.add_argument("--frames", action="store_true", help="videos are folders of images")
    lists.set_defaults(run=_list)

    videos = commands.add_parser(
        "reencode",
        help="make videos small and quick to read",
        description="Write each video below SOURCE to the same place below TARGET: H.264, upright, "
        "without sound, a keyframe every 32 frames. What is there already, no older than its "
        "source, is left alone, so a stopped run goes on. Broken videos are named in "
        "TARGET/broken.txt.",
    )
    videos.add_argument("source", type=Path, metavar="SOURCE")
    videos.add_argument("target", type=Path, metavar="TARGET")
    videos.add_argument("--short-side", type=int, default=256, help="at most, in pixels (256)")
    videos.add_argument("--fps", type=float, help="frames/s (all frames, at their times)")
    videos.add_argument("--frames", action="store_true", help="folders of JPEG images, not mp4")
    videos.add_argument(
        "--workers", type=_count, default=cores, help=f"processes ({cores}); 0 for none but this"
    )
    videos.set_defaults(run=_reencode)

    index = commands.add_parser(
        "index",
        help="write the index of tar shards",
        description="Write where in which tar file each video lies: name, shard, offset, size and "
        "label, with tabs between. Without --labels the first folder of a name is its class.",
    )
    index.add_argument("root", type=Path, metavar="ROOT", help="folder that paths are relative to")
    index.add_argument("--shards", default="*.tar", metavar="GLOB", help="below ROOT (*.tar)")
    index.add_argument("--labels", type=Path, metavar="LIST", help="`name label` a line")
    index.add_argument("--output", type=Path, help="file in ROOT (index.txt)", default="index.txt")
    index.set_defaults(run=_index)

    check = commands.add_parser(
        "check",
        help="find what is wrong with a data set",
        description="Open every video of the lists. Those that can be read are kept in "
        "ROOT/check.jsonl, and only others, new or changed are opened next time; remove that file "
        "to open all again.",
    )
    check.add_argument("root", metavar="ROOT", help="folder that paths are relative to")
    check.add_argument(
        "--list", nargs="+", metavar="FILE", help="in ROOT (train.txt and test.txt), or folders"
    )
    check.add_argument("--layout", choices=("files", "frames", "shards"), default="files")
    check.add_argument("--classes", default="classes.txt", metavar="FILE", help="in ROOT")
    check.add_argument("--reader", choices=("decord", "pyav", "torchcodec"), default="decord")
    check.add_argument(
        "--decode",
        action="store_true",
        help="read three frames of each, too; with decord, ask PyAV if they are right",
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="where all that is wrong goes")
    check.add_argument(
        "--workers", type=_count, default=cores, help=f"processes ({cores}); 0 for none but this"
    )
    check.set_defaults(run=_check)
    return parser


def _list(options: argparse.Namespace) -> int:
    from train.lists import ListError
    from train.partial import write_text
    from train.prepare import layouts
    from train.prepare.found import FRAME_NAME, survey

    if not 0 < options.test_share < 1:
        raise ValueError(f"--test-share must be above 0 and below 1, got {options.test_share}")
    annotations, has_folders = options.annotations, options.layout in ("folders", "frames")
    if has_folders == bool(annotations):
        needed = "takes no" if has_folders else "needs"
        raise ValueError(f"list {options.layout} {needed} --annotations")
    if options.layout in ("sthv2", "ucf") and len(annotations) > 1:
        raise ValueError(f"list {options.layout} needs one folder of --annotations")
    has_images = options.frames or options.layout == "frames"
    found = survey(options.root, FRAME_NAME if has_images else None)
    if has_folders:
        lists = layouts.of_folders(options.root, found, options.test_share, options.seed)
    elif options.layout == "kinetics":
        lists = layouts.of_kinetics(found, annotations)
    elif options.layout == "sthv2":
        lists = layouts.of_sthv2(found, annotations[0])
    else:
        lists = layouts.of_ucf(found, annotations[0], options.split)

    for split in ("train", "test"):
        if not getattr(lists, split):
            missing = f", {len(lists.missing)} are missing" if lists.missing else ""
            raise ListError(f"{options.root}: there is no video for {split}.txt{missing}")
    output = options.output or options.root
    for split in ("train", "test"):
        videos = getattr(lists, split)
        words = [(v.name, v.frames, v.label) if has_images else (v.name, v.label) for v in videos]
        write_text(output / f"{split}.txt", "".join(" ".join(map(str, w)) + "\n" for w in words))
    write_text(output / "classes.txt", "".join(f"{name}\n" for name in lists.classes))
    if lists.missing:
        write_text(output / "missing.txt", "".join(f"{name}\n" for name in lists.missing))
    else:
        (output / "missing.txt").unlink(missing_ok=True)
    print(
        f"{output}: {len(lists.classes)} classes, {len(lists.train)} videos in train.txt, "
        f"{len(lists.test)} in test.txt"
    )
    for split in ("train", "test"):
        _show(f"classes without videos in {split}.txt", lists.empty_classes(split))
    _show("missing (all in missing.txt)", lists.missing)
    _show("left out", [f"{name}: {reason}" for name, reason in lists.skipped])
    return 0


def _reencode(options: argparse.Namespace) -> int:
    from train.prepare.reencode import Settings, reencode

    settings = Settings(options.short_side, options.fps, options.frames)
    outcome = reencode(options.source, options.target, settings, options.workers)
    print(
        f"{options.target}: {outcome.written} videos written, {outcome.kept} were there, "
        f"{len(outcome.broken)} are broken"
    )
    _show("broken (all in broken.txt)", [f"{name}: {why}" for name, why in outcome.broken])
    # Of every large set some are broken, and that stops nobody; if all are, something is wrong.
    return int(bool(outcome.broken) and not outcome.written and not outcome.kept)


def _index(options: argparse.Namespace) -> int:
    from train.lists import read_class_names, read_list
    from train.partial import write_text
    from train.prepare.shards import build_index, write_lines

    names = options.root / "classes.txt"
    # The index of a second set of shards, those for testing, must number the classes alike.
    classes = read_class_names(names) if names.exists() and options.labels is None else None
    labels = None if options.labels is None else read_list(options.labels)
    index = build_index(options.root, options.shards, labels, classes)
    if index.classes is not None and classes is None:
        write_text(names, "".join(f"{name}\n" for name in index.classes))
    output = options.root / options.output
    write_text(output, write_lines(index.videos))
    print(f"{output}: {len(index.videos)} videos in {len({v.shard for v in index.videos})} shards")
    _show("in the list of labels and in no shard", index.missing)
    _show("left out", [f"{name}: {reason}" for name, reason in index.skipped])
    _show(
        "there twice, of which the first is listed: names must differ",
        [f"{name} in {first} and {other}" for name, first, other in index.duplicates],
        file=sys.stderr,
    )
    return int(bool(index.duplicates))


def _check(options: argparse.Namespace) -> int:
    from train.data import DataSettings
    from train.partial import write_text
    from train.prepare.check import RECORD, check

    lists = options.list or [n for n in ("train.txt", "test.txt") if Path(options.root, n).exists()]
    if not lists:
        raise ValueError(f"{options.root}: no train.txt or test.txt; name the lists with --list")
    settings = DataSettings(
        root=options.root,
        layout=options.layout,
        reader=options.reader,
        class_names=options.classes,
    )
    checked = check(lists, settings, decode=options.decode, workers=options.workers)
    for name, number in checked.videos.items():
        print(f"{name}: {number} videos")
    if checked.classes is None:
        print(f"no {options.classes}: labels are compared with nothing")
    print(f"opened {checked.opened}, {checked.known} known from {RECORD}")
    for kind, lines in checked.faults.items():
        _show(kind, lines)
    if options.json is not None:
        fields = {"lists": checked.videos, "classes": checked.classes, "faults": checked.faults}
        write_text(options.json, json.dumps(fields, indent=1, ensure_ascii=False) + "\n")
    if checked.is_well:
        print("all is well")
    return int(not checked.is_well)


def _show(title: str, lines: Sequence[str], file: TextIO | None = None) -> None:
    """Print how many there are, if any, and the first of them."""
    if not lines:
        return
    rest = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    print("\n  ".join([f"{title}: {len(lines)}", *lines[:_SHOWN], *rest]), file=file or sys.stdout)


def _count(word: str) -> int:
    from train.recipe import count

    return 0 if word == "0" else count(word)


if __name__ == "__main__":
    sys.exit(main())
