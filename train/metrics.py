"""What is measured: scores of a video from its views, top-k and mean class accuracy."""

from __future__ import annotations

import torch
from torch import Tensor


def video_scores(logits: Tensor) -> Tensor:
    """Class probabilities [B, classes] of videos from logits [B, views, classes], float32.

    The softmax comes before the mean: views vote with probabilities.

    Source: upstream `average_clips='prob'`.
    """
    return logits.float().softmax(dim=-1).mean(dim=1)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of the rows of `scores` [B, classes] whose label [B] is among the k highest; 0 to 1.

    Of equal scores the class of the larger number is the higher, as upstream's `argsort` leaves
    them in short rows. A row that has scores that are no finite numbers is not right. NaN without
    rows; k above the number of classes counts them all.

    Source: mmaction2 0.15 `top_k_accuracy`.
    """
    best = scores.argsort(dim=1, stable=True)[:, -k:]
    is_right = (best == labels[:, None]).any(dim=1) & scores.isfinite().all(dim=1)
    return is_right.double().mean().item()


def mean_class_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Mean over classes of the share of their videos predicted right; 0 to 1, NaN without any.

    Over the classes that occur in `labels` or in `predicted` (both int64 [B]); one that is only
    predicted counts 0, as upstream.

    Source: mmaction2 0.15 `mean_class_accuracy`.
    """
    classes = torch.unique(torch.cat([predicted, labels]))
    is_class = labels[:, None] == classes
    hits = (is_class & (predicted == labels)[:, None]).sum(dim=0)
    return (hits / is_class.sum(dim=0).clamp_min(1)).double().mean().item()
