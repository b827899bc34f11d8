"""The tests on a GPU: a few processes side by side, in parts small enough to be continued."""

from __future__ import annotations

import hashlib
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from bench.jobs import Done, Job, run
from bench.machine import ROOT, SUFFIXES
from bench.report import tabulate
from bench.stages import Context, Part, Stage, half_the_processors

PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider")
# Tests of one part: what a deadline cuts off is run again from the beginning of its part.
PART = 40
# The files of the kernels, which spend their time compiling and emulating: they begin, and are cut
# into parts. Those that build programs for all their tests are not: each part would build them.
FIRST = (
    *("attention", "triton", "kernel_sets", "norm", "merging", "registered", "declared", "model"),
    "cuda",
)
LIMIT = 300.0
# Several processes share the processors; Inductor alone would start one for each in each of them.
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
NO_TESTS = 5
TRACE_LINES = 25
COUNTS = ("passed", "failing", "skipped", "seconds")


def stage(context: Context) -> Stage:
    """Parts of all files, or of those that the arguments name."""
    files = context.arguments or [f"tests/{p.name}" for p in ROOT.glob("tests/test_*.py")]
    files = sorted(files, key=lambda name: (rank(name), name))
    tests = collect(files, context)
    # Other tests are not continued: a commit says only that something in them differs.
    version = digest(ROOT / "tests")
    parts = []
    for file in files:
        # What cannot be collected says so when it is run.
        names = tests.get(file, [file])
        size = PART if rank(file) < len(FIRST) else len(names)
        pieces = [names[start : start + size] for start in range(0, len(names), size)]
        for number, piece in enumerate(pieces, 1):
            key = {"bench": "suite", "file": file, "part": f"{number}/{len(pieces)}"}
            key |= {"tests": version, "without": " ".join(context.without)}
            parts.append(part(key, piece, context.logs))
    return Stage(parts, half_the_processors(), by_file)


def rank(file: str) -> int:
    """The place of a file in the order: that of the first word of `FIRST` in its name."""
    return next((place for place, word in enumerate(FIRST) if word in file), len(FIRST))


def collect(files: list[str], context: Context) -> dict[str, list[str]]:
    """file -> names of its tests."""
    job = Job("collect", [*PYTEST, "--collect-only", *files], ENVIRONMENT)
    deadline = max(context.deadline, time.monotonic() + 60)
    (done,) = run([job], context.logs, deadline=deadline)
    tests = defaultdict(list)
    for line in done.output.splitlines():
        file, separator, _ = line.partition("::")
        if separator and file in files:
            tests[file].append(line)
    return tests


def digest(folder: Path) -> str:
    """Twelve digits of the sum of a folder's sources."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES:
            total.update(path.read_bytes())
    return total.hexdigest()[:12]


def part(key: dict, names: list[str], logs: Path) -> Part:
    """A few tests of a file, in a process of their own."""
    name = f"suite_{Path(key['file']).stem}_{key['part'].replace('/', '_of_')}"
    results = logs / f"{name}.xml"
    command = [*PYTEST, f"--junitxml={results}", *names]
    job = Job(name, command, ENVIRONMENT, limit=LIMIT)
    return Part(job, key, lambda done: [row_of(done, results)])


def row_of(done: Done, results: Path) -> dict:
    """Counts of a part, its failures with the ends of their traces, and the reasons of skips."""
    seconds = {"seconds": round(done.seconds, 1)}
    if not results.exists():
        said = done.failure or "it wrote no results"
        failures = [[done.job.name, f"{done.output}\n{said}"]]
        return {"failing": 1, "failed": said, "failures": failures, **seconds}
    counts, failures, reasons = Counter(), [], []
    for case in ElementTree.parse(results).iter("testcase"):
        faults = [*case.iter("failure"), *case.iter("error")]
        for fault in faults[:1]:
            trace = (fault.text or fault.get("message", "")).splitlines()[-TRACE_LINES:]
            failures.append([f"{case.get('classname')}::{case.get('name')}", "\n".join(trace)])
        reasons += map(reason, case.iter("skipped"))
        skipped = case.find("skipped") is not None
        counts["failing" if faults else "skipped" if skipped else "passed"] += 1
    row = {**{name: counts[name] for name in COUNTS[:3]}, **seconds, "reasons": reasons}
    if failures:
        return {**row, "failed": f"{len(failures)} failed", "failures": failures}
    if done.failure and done.status != NO_TESTS:
        return {**row, "failed": done.failure, "failures": [[done.job.name, done.output]]}
    return row


def reason(skipped: ElementTree.Element) -> str:
    """Why a test, or a whole file, was skipped."""
    said = skipped.get("message", "")
    if said == "collection skipped":
        # Of a file the text has the reason, as the end of a tuple that Python printed.
        said = re.sub(r"""['"]\)$""", "", (skipped.text or said).rpartition("Skipped: ")[2])
    return said


def by_file(rows: Iterable[dict]) -> str:
    """A line for each file, and their sum."""
    files = defaultdict(Counter)
    for row in rows:
        for name in (row["file"], "all"):
            files[name].update({count: row.get(count, 0) for count in COUNTS})
    total = files.pop("all", Counter())
    longest = sorted(files.items(), key=lambda item: -item[1]["seconds"])
    return tabulate(
        [{"file": name, **counts} for name, counts in [*longest, ("all", total)]],
        ("file", *COUNTS),
    )
