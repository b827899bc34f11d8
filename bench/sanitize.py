"""compute-sanitizer's four tools over every operator, forward and backward, on small shapes."""

from __future__ import annotations

import re
import shutil
from functools import partial
from itertools import product
from pathlib import Path

from bench.jobs import ENDED, Done, Job
from bench.report import tabulate
from bench.smoke import absence
from bench.stages import Context, Part, Stage, asked, half_the_processors, python

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
COLUMNS = ("tool", "kernels", "operator", "errors", "seconds")


def stage(context: Context) -> Stage:
    """One process for each tool, kernel set and operator."""
    program, (chosen, others) = find(), asked(context)
    parts = []
    for tool, kernels, operator in product(TOOLS, chosen.kernels, chosen.operators):
        options, environment = TOOLS[tool]
        words = ["--device", context.device, "--sanitized", "--shapes", "small"]
        words += ["--kernels", kernels, "--operators", operator, "--dtypes", *chosen.dtypes]
        command = [
            *(program, "--tool", tool, "--error-exitcode", FOUND, *options),
            # The compilers that Triton starts need no check.
            *("--target-processes", "application-only"),
            *python("smoke.py", *words, *others),
        ]
        rows, reason = row_of, absence(kernels, operator)
        if program is None:
            reason = f"{PROGRAM} is not installed"
        if reason is not None:
            # Nothing to run, but a row.
            command, rows = ["true"], partial(not_run, reason)
        key = {"bench": "sanitize", "tool": tool, "kernels": kernels, "operator": operator}
        job = Job("_".join(key.values()), command, environment, LIMIT)
        parts.append(Part(job, key, rows))
    return Stage(parts, half_the_processors(), lambda rows: tabulate(rows, COLUMNS))


def find() -> str | None:
    """Where compute-sanitizer is; toolkits do not always put it on the path."""
    toolkit = Path("/usr/local/cuda")
    places = (None, toolkit / "bin", toolkit / "compute-sanitizer")
    return next(filter(None, (shutil.which(PROGRAM, path=place) for place in places)), None)


def not_run(reason: str, done: Done) -> list[dict]:
    return [{"reason": reason}]


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
