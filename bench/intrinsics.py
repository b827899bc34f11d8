"""Each intrinsic of the CUDA C++ kernels alone: emulated on the processor, and run by the GPU.

`python bench/intrinsics.py` compares their words; it exits with 1 where they are further apart than
intrinsic_checks.py allows.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from bench.harness import Rows, header
from bench.intrinsic_checks import CHECKS
from videoswin_kernels import extension

COLUMNS = ("intrinsic", "words", "differ", "worst", "bound", "within")
# What lies where results go, so that a word that neither of them writes differs.
EMULATED_FILL, NATIVE_FILL = 0x11111111, 0x22222222
# Runs an intrinsic: name, words in -> words out.
Run = Callable[[str, np.ndarray], np.ndarray]


def runner(control: ModuleType, launch: Callable[..., int], device: str, fill: int) -> Run:
    """Runs intrinsics by `launch`, which gets a name and the addresses of words on a device."""
    sizes = control.intrinsics()

    def run(name: str, given: np.ndarray) -> np.ndarray:
        words_in, words_out = sizes[name]
        assert (given.dtype, given.size) == (np.uint32, words_in), name
        data = torch.from_numpy(given.view(np.int32)).to(device, copy=True)
        out = torch.full((words_out,), fill, dtype=torch.int32, device=device)
        error = launch(name, out.data_ptr(), data.data_ptr())
        if error:
            raise RuntimeError(f"its launch on {device} ends with error {error}")
        return out.cpu().numpy().view(np.uint32)

    return run


def compare(name: str, emulate: Run, run: Run) -> dict:
    """The items of a row on an intrinsic: words that differ, and the worst of them."""
    if name not in CHECKS:
        return {"failed": "bench/intrinsic_checks.py has none for it"}
    check, again = CHECKS[name], partial(emulate, name)
    try:
        off = np.concatenate(
            [
                check.apart(emulate(name, given), run(name, given), given, again)
                for given in check.inputs(np.random.default_rng(0))
            ]
        )
    except Exception as fault:  # Whatever it is, the others shall be asked.
        traceback.print_exc()
        said = f"{type(fault).__name__}: {str(fault).strip().partition(chr(10))[0]}"
        return {"failed": said}
    differ, worst = int((off > 0).sum()), float(off.max())
    items = {"words": len(off), "differ": differ, "worst": worst, "bound": check.bound}
    items["within"] = worst <= check.bound
    if not items["within"]:
        items["failed"] = f"{differ} of {len(off)} words differ, the worst by {worst:.1e}"
    return items


def rows(control: ModuleType, emulate: Run, run: Run) -> Iterator[dict]:
    """A row for each intrinsic that there is."""
    for name in control.intrinsics():
        row = {"bench": "intrinsics", "intrinsic": name, **compare(name, emulate, run)}
        if "failed" in row:
            row["failures"] = [[f"intrinsic {name}", row["failed"]]]
        yield row


def asked() -> Iterator[dict]:
    """The rows of this machine, or one that says why there are none."""
    place = {"bench": "intrinsics", "intrinsic": "all"}
    try:
        control = extension.control()
        native = control.run_native
    except ModuleNotFoundError:
        yield {**place, "reason": f"_C is not built; pip install pybind11 and {extension.BUILD}"}
    except ImportError as error:
        yield {**place, "failed": str(error)}
    except AttributeError:
        yield {**place, "failed": f"_C has none for a GPU: {extension.why_not('_ops')}"}
    else:
        stream = torch.cuda.current_stream().cuda_stream
        run = runner(control, lambda *words: native(*words, stream), "cuda", NATIVE_FILL)
        emulate = runner(control, control.run_emulated, "cpu", EMULATED_FILL)
        yield from rows(control, emulate, run)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="add the rows to this file")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here, and there is nothing to compare with")
    found, failures = Rows(options.json, header("cuda")), 0
    for row in asked():
        found.append(row)
        failures += "failed" in row
    print(found.table(COLUMNS, {"bench": "intrinsics"}))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
