"""Weights in every format people hold them in: recognised, checked, loaded, and written back."""

from model.weights.files import WeightsError
from model.weights.formats import to_official, to_torchvision
from model.weights.load import Loaded, load_weights, save_weights

__all__ = [
    "Loaded",
    "WeightsError",
    "load_weights",
    "save_weights",
    "to_official",
    "to_torchvision",
]
