"""What the tests of the model share: weights far from init, golden files, torchvision's twin."""

import functools
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torchvision.models.video.swin_transformer import SwinTransformer3d

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


@functools.cache
def golden_case(name):
    """(config, tensors) of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def randomize(model, seed=0):
    """Puts every parameter far from its initial value, where zero biases would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "table" in name:
                parameter.normal_(generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2, generator=generator)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return model


def torchvision_name(name):
    """torchvision's name of an official parameter."""
    name = name.removeprefix("backbone.").replace("cls_head.fc_cls", "head")
    name = re.sub(r"layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1])}", name)
    name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"features.{2 * int(m[1]) + 1}", name)
    return name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")


def torchvision_twin(config, parameters):
    """torchvision's model of an official backbone config, with the parameters of that backbone."""
    has_bias = config.get("qkv_bias", True)
    config = {
        name: value for name, value in config.items() if name not in ("patch_norm", "qkv_bias")
    }
    twin = SwinTransformer3d(**config, num_classes=1)
    state = {torchvision_name(name): value for name, value in parameters.items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    for name in missing:
        if name.endswith("qkv.bias"):
            # torchvision always builds this bias; at zero it is none.
            assert not has_bias
            torch.nn.init.zeros_(twin.get_parameter(name))
        else:
            assert "relative_position_index" in name or name.startswith("head."), name
    return twin.eval()


def torchvision_features(twin, clips):
    """The feature map [B, C, D, H, W] before torchvision's pooling and head."""
    x = twin.norm(twin.features(twin.pos_drop(twin.patch_embed(clips))))
    return x.permute(0, 4, 1, 2, 3)


def error(got, truth):
    """Relative error in the Euclidean norm."""
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()
