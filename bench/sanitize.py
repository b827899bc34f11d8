"""compute-sanitizer's four tools over every operator, forward and backward, on small shapes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from bench.jobs import ENDED, Done, Job
from bench.report import tabulate
from bench.stages import Context, Part, Stage, half_the_processors, python
from videoswin_kernels.selection import OPERATORS

PROGRAM = "compute-sanitizer"
# Its own exit status where it found something; any other is that of smoke.py.
FOUND = 99
# Of blocks that torch's allocator keeps, a read past a tensor's end would be of valid memory.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Options and environment. torch asks the driver for what older ones lack: no error of ours.
TOOLS = {
    "memcheck": (("--report-api-errors", "no"), UNCACHED),
    "racecheck": ((), {}),
    "synccheck": ((), {}),
    "initcheck": ((), UNCACHED),
}
# What a tool prints last.
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
LIMIT = 300.0
COLUMNS = ("tool", "operator", "errors", "seconds")


def stage(context: Context) -> Stage:
    """One process for each tool and operator."""
    program = find()
    parts = []
    for tool, (options, environment) in TOOLS.items():
        for operator in OPERATORS:
            command = [
                *(program or PROGRAM, "--tool", tool, "--error-exitcode", FOUND, *options),
                # The compilers that Triton starts need no check.
                *("--target-processes", "application-only"),
                *python("smoke.py", "--device", context.device, "--sanitized"),
                *("--shapes", "small", "--operators", operator, *context.arguments),
            ]
            if program is None:
                # Nothing to run, but a row.
                command = ["true"]
            job = Job(f"sanitize_{tool}_{operator}", command, environment, LIMIT)
            key = {"bench": "sanitize", "tool": tool, "operator": operator}
            parts.append(Part(job, key, row_of if program else absent))
    return Stage(parts, half_the_processors(), lambda rows: tabulate(rows, COLUMNS))


def find() -> str | None:
    """Where compute-sanitizer is; toolkits do not always put it on the path."""
    toolkit = Path("/usr/local/cuda")
    places = (None, toolkit / "bin", toolkit / "compute-sanitizer")
    return next(filter(None, (shutil.which(PROGRAM, path=place) for place in places)), None)


def absent(done: Done) -> list[dict]:
    return [{"reason": f"{PROGRAM} is not installed"}]


def row_of(done: Done) -> list[dict]:
    """What a tool found; a tool that does not work here has its own words for it."""
    said = done.output
    summary = SUMMARY.findall(said)
    row = {"errors": int(summary[-1]) if summary else None, "seconds": round(done.seconds, 1)}
    own = [line.strip("= ") for line in said.splitlines() if line.startswith("=====")]
    refusal = [line for line in own if "device not supported" in line.lower()]
    if refusal or (done.end == ENDED and done.status > 0 and not summary):
        words = (refusal or own or said.splitlines() or ["it says nothing"])[0]
        return [{"reason": f"{PROGRAM} does not work here: {words}"}]
    if row["errors"] or done.status == FOUND:
        findings = [line for line in own if line and not line.startswith("COMPUTE-SANITIZER")]
        trouble = f"{row['errors']} errors, the first: {findings[0]}"
        # The end of the output may be far from them.
        said = "\n".join(own[:30])
    elif done.failure:
        trouble = f"smoke.py: {done.failure}"
    elif not summary:
        trouble = "it printed no summary"
    else:
        return [row]
    return [{**row, "failed": trouble, "failures": [[done.job.name, said[-3000:]]]}]
