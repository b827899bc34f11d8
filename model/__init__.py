"""Video Swin Transformer: backbone, classifier, and the released sizes."""

from model.variants import create
from model.video_swin import SwinTransformer3D, VideoSwin

__all__ = ["SwinTransformer3D", "VideoSwin", "create"]
