"""Video Swin Transformer: backbone, classifier, the released sizes, and weights for them."""

from model.variants import create
from model.video_swin import SwinTransformer3D, VideoSwin
from model.weights import load_weights

__all__ = ["SwinTransformer3D", "VideoSwin", "create", "load_weights"]
