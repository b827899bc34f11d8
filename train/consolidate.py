"""`python -m train.consolidate DIR.parts`: one checkpoint file of one that is in parts."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from train.checkpoint import CheckpointError, load_rest, save_checkpoint
from train.saving import reason_of


def consolidate(folder: Path, output: Path) -> None:
    """Writes the checkpoint in `folder`, which processes under FSDP2 have written, as one file.

    No process group is needed, and memory for the whole of it.

    Raises:
        CheckpointError: no checkpoint in parts, or a damaged one.
        OSError: `output` cannot be written.
    """
    rest = load_rest(folder)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        whole = Path(scratch, "whole.pt")
        try:
            dcp_to_torch_save(folder, whole)
            found = torch.load(whole, map_location="cpu", weights_only=True)
        except (Exception, CheckpointException) as error:
            # torch raises what each of its readers meets.
            raise CheckpointError(f"cannot load {folder}: {reason_of(error)}") from error
        save_checkpoint(output, {**found, **rest})


def main(arguments: list[str] | None = None) -> int:
    """Consolidate as the command line says; the exit status: 0 done, 1 refused."""
    parser = argparse.ArgumentParser(prog="python -m train.consolidate", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR.parts")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: whole.pt beside it")
    options = parser.parse_args(arguments)
    output = options.output or options.folder.with_name("whole.pt")
    try:
        consolidate(options.folder, output)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
        return 1
    print(f"{output}: step {load_rest(options.folder)['step']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
