"""The C++ libraries on a GPU: built before a stage that asks their kernels, where they are not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import torch

from bench.harness import Rows
from bench.jobs import CUT_OFF, ENDED, Done, Job, run
from bench.machine import ROOT
from bench.report import Report
from bench.stages import Context

# Asked in a process of its own: one that has loaded a library cannot load the next of that name.
ASK = """
import json
from videoswin_kernels import extension
reasons = [extension.why_not(name) for name in ("_ops", "_emulated")]
print(json.dumps([next(filter(None, reasons), None), extension.build_facts("_ops")]))
"""
# The status of setup.py where a tool is missing, and how it begins its own sentences.
TOOL_MISSING = 3
SENTENCE = re.compile(r"^videoswin_kernels: (.+)", re.MULTILINE)
LIMIT = 300.0


def state() -> tuple[str | None, dict]:
    """(why the kernels cannot run, None if they can; what their library says of its build)."""
    done = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return f"asking the C++ libraries ended with status {done.returncode}", {}
    why, facts = json.loads(lines[-1])
    return why, facts


def job(capability: tuple[int, int]) -> Job:
    """Builds them for one architecture alone, that of this card."""
    major, minor = capability
    architecture = "90a-real" if capability == (9, 0) else f"{major}{minor}-real"
    environment = {
        "VIDEOSWIN_ARCHITECTURES": os.environ.get("VIDEOSWIN_ARCHITECTURES") or architecture,
        # Toolkits do not always put nvcc on the path.
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]),
    }
    return Job("build", [sys.executable, "setup.py", "build_ext"], environment, LIMIT)


def outcome(done: Done) -> dict:
    """The items of a row on a build that has ended."""
    said = (SENTENCE.findall(done.output) or [""])[-1]
    if done.end == ENDED and done.status == TOOL_MISSING:
        return {"reason": said}
    failed, items = done.failure, {}
    if failed is None:
        failed, items["facts"] = state()
    elif said:
        failed += f": {said}"
    if failed is not None:
        # The whole is in the log.
        items |= {"failed": failed, "failures": [["build", f"{done.output[-3000:]}\n{failed}"]]}
    return items


def build(context: Context, rows: Rows) -> Report:
    """Builds what is missing, or made of other sources, adds a row on it, and tells how it went."""
    if state()[0] is None:
        return Report("build", ["build: the libraries are there"], [], [], "", "")
    jobs = [job(torch.cuda.get_device_capability())]
    done = next(run(jobs, context.logs, deadline=context.deadline), None)
    if done is None or done.end == CUT_OFF:
        return Report("build", ["build: cut off"], [], [], "the build is left", "")
    row = {"bench": "build", "seconds": round(done.seconds, 1), **outcome(done)}
    rows.append(row)
    ran = f"build: {done.failure or done.end}, {done.seconds:.1f} s"
    failures = [tuple(each) for each in row.get("failures", ())]
    return Report("build", [ran], failures, list(filter(None, [row.get("reason")])), "", "")
