"""Asks an installed wheel, from a folder of its own, for what it is installed for.

    python .ci/installed.py           # the kernels for processors compute what torchvision does
    python .ci/installed.py --cuda    # and the library has kernels for GPUs

Needs torchvision. Ends with status 1 and a sentence where something is not as it should be.
"""

import copy
import sys
from importlib import metadata, util
from pathlib import Path

import torch
from torchvision.models.video import swin3d_t

import videoswin_kernels
from videoswin_kernels import accelerate, explain, extension

# Of the largest logit. In float64 they are the same numbers, summed in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def demand(is_so: bool, sentence: str) -> None:
    if not is_so:
        raise SystemExit(f"{Path(__file__).name}: {sentence}")


def main(needs_cuda: bool) -> None:
    place = Path(videoswin_kernels.__file__).parent
    version = videoswin_kernels.__version__
    demand(not (place.parent / "setup.py").exists(), f"{place} is a checkout, no wheel")
    installed = metadata.version("videoswin-kernels")
    demand(installed == version, f"{installed} is installed, and says of itself {version}")
    for name in ("model", "train"):
        demand(util.find_spec(name) is None, f"{name} is installed, too")
    reason = extension.why_not("_ops_cpu")
    demand(reason is None, f"there are no kernels for processors: {reason}")
    if needs_cuda:
        facts = extension.build_facts("_ops")
        demand(facts["cuda"] is not None, f"there are no kernels for GPUs: {facts['why_no_cuda']}")
        print(f"CUDA {facts['cuda']}: {', '.join(facts['architectures'])}")
    torch.manual_seed(0)
    for dtype, tolerance in TOLERANCE.items():
        model = swin3d_t(num_classes=5).to(dtype).eval()
        clips = torch.randn(1, 3, 6, 60, 44, dtype=dtype)
        with torch.inference_mode():
            expected = copy.deepcopy(model)(clips)
            logits = accelerate(model)(clips)
        kernels = {choice.kernels for choice in explain(model)}
        demand(kernels == {"cpu"}, f"the kernels should be cpu, got {', '.join(sorted(kernels))}")
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        demand(error <= tolerance, f"{dtype}: logits differ by {error:.1e}, {tolerance} at most")
        print(f"{dtype}: the logits of swin3d_t, within {error:.1e}")
    print(f"videoswin_kernels {version} is as it should be, in {place}")


if __name__ == "__main__":
    main("--cuda" in sys.argv[1:])
