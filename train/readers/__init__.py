"""What decodes videos, a library a file; `train.video.open_video` opens them."""
