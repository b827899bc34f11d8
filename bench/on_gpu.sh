#!/usr/bin/env bash
# Runs one stage of the work that needs a GPU, within the minutes that such a machine is lent for.
set -uo pipefail

usage() {
    cat <<'END'
bash bench/on_gpu.sh STAGE OUTPUT [--minutes 8] [arguments of the stage]

stages
  smoke       one case of every operator, kernel set, dtype and direction against float64, and
              every intrinsic of the CUDA C++ kernels against its emulation;
              with --device cpu, on any machine, interpreted and emulated, without the intrinsics
  suite       the tests but the slow ones; arguments: files, such as tests/test_attention.py
  sanitize    compute-sanitizer's four tools on small shapes
  ceilings    what this card reaches: copy, matrix products, exponentials, shared memory
  attention   bench/attention.py, all stages, shifted and not, forward and backward
  operators   the operators beside attention, forward and backward
  model       whole models, forward
  step        training steps
  tune FILE   variants of the Triton attention, which FILE lists; see bench/tune.py

A stage ends after --minutes. OUTPUT then holds rows.jsonl, report.txt and logs.tar.gz; called
again with that rows.jsonl in OUTPUT, on the same card and code, it goes on from there. Exit
status: 0 all is well, 1 something failed, 2 it cannot run here, 3 something is left to do.

On a GPU smoke, suite and sanitize first build the C++ libraries, for that card alone, where they
are missing or of other sources. Where that does not work they say so, and go on with Triton.

PYTHON names the interpreter (python3), VIDEOSWIN_COMMIT the commit where the checkout has no
history. The device machine needs Python 3.10, torch 2.10, Triton 3.6, einops and pytest; for the
libraries nvcc, a C++ compiler, CMake and ninja; for the intrinsics pybind11.
END
}

refuse() {
    echo "on_gpu.sh: $1" >&2
    exit 2
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "") usage >&2; refuse "STAGE is missing" ;;
esac
stages="smoke suite sanitize ceilings attention operators model step tune"
[[ " $stages " == *" $1 "* ]] || refuse "no stage is called $1; there are $stages"
stage=$1
case "${2:-}" in
    "" | -*) refuse "OUTPUT, a folder for the results, is missing: on_gpu.sh $stage OUTPUT" ;;
esac
output=$2
shift 2
if [ "$stage" = tune ] && [ ! -f "${1:-}" ]; then
    refuse "tune needs a FILE of variants, got '${1:-}'"
fi

minutes=8
device=cuda
words=()
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes | --device)
            [ $# -gt 1 ] || refuse "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            ;;
        --minutes=* | --device=*)
            word=${1#--}
            declare "${word%%=*}=${word#*=}"
            shift
            ;;
        *)
            words+=("$1")
            shift
            ;;
    esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] ||
    refuse "--minutes must be a whole number above 0, got $minutes"

python=${PYTHON:-python3}
command -v "$python" >/dev/null || refuse "$python is not there; PYTHON names another interpreter"
"$python" - "$stage" "$device" <<'END' || exit 2
import sys
from importlib.metadata import PackageNotFoundError, version

stage, device = sys.argv[1:]


def refuse(why):
    sys.exit(f"on_gpu.sh: {why}")


if sys.version_info < (3, 10):
    refuse(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
for package, least in (("torch", (2, 10)), ("triton", (3, 6)), ("einops", ()), ("pytest", ())):
    try:
        found = version(package)
    except PackageNotFoundError:
        refuse(f"{package} is not installed; pip install {package}")
    if tuple(int(part) for part in found.split(".")[:2]) < least:
        refuse(f"{package} {'.'.join(map(str, least))} or newer is needed, this is {found}")
if device not in ("cuda", "cpu"):
    refuse(f"--device must be cuda or cpu, got {device}")
if device == "cpu" and stage != "smoke":
    refuse(f"--device cpu is for smoke alone, got {stage}")
if device == "cuda":
    import torch

    if not torch.cuda.is_available():
        refuse("torch finds no CUDA GPU here (smoke takes --device cpu)")
END

mkdir -p "$output" || refuse "$output cannot be made"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The driver stops itself; where it cannot, it is stopped, and what it leaves is packed.
timeout --kill-after=15 $((60 * minutes + 60)) \
    "$python" "$here/on_gpu.py" --device "$device" --minutes "$minutes" "$stage" "$output" \
    ${words[@]+"${words[@]}"}
status=$?
if [ -d "$output/logs" ]; then
    tar -C "$output" -czf "$output/logs.tar.gz" logs && rm -rf "$output/logs"
    echo "on_gpu.sh: ended from outside (status $status); rows.jsonl has what was finished" >&2
    [ $status -ne 0 ] || status=1
fi
exit $status
