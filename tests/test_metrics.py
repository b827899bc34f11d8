"""Scores and accuracies against judges in plain Python."""

from math import exp, isnan

import numpy as np
import pytest
import torch

from train.metrics import mean_class_accuracy, top_k_accuracy, video_scores


def judged_scores(views: list[list[float]]) -> list[float]:
    shares = [[exp(logit) / sum(map(exp, view)) for logit in view] for view in views]
    return [sum(column) / len(views) for column in zip(*shares, strict=True)]


def judged_top_k(scores: list[list[float]], labels: list[int], k: int) -> float:
    better = [sum(s > row[label] for s in row) for row, label in zip(scores, labels, strict=True)]
    return sum(count < k for count in better) / len(labels)


def judged_mean_class(predicted: list[int], labels: list[int]) -> float:
    shares = []
    for kind in sorted({*predicted, *labels}):
        of_kind = [p for p, label in zip(predicted, labels, strict=True) if label == kind]
        shares.append(of_kind.count(kind) / len(of_kind) if of_kind else 0.0)
    return sum(shares) / len(shares)


@pytest.mark.trap(29)
def test_views_vote_with_probabilities_not_with_logits():
    # One view is loud: the mean of the logits would follow it, against two that agree.
    logits = torch.tensor([[[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]]])
    assert logits.mean(dim=1).argmax() == 0
    assert video_scores(logits).argmax() == 1


@pytest.mark.trap(29)
def test_scores_are_the_mean_over_views_of_the_softmax_over_classes():
    logits = 3 * torch.randn(4, 5, 6)
    scores = video_scores(logits)
    judged = torch.tensor([judged_scores(views) for views in logits.tolist()])
    torch.testing.assert_close(scores, judged)


def test_scores_of_half_precision_logits_are_those_of_float32():
    logits = torch.randn(2, 3, 4).bfloat16()
    assert video_scores(logits).dtype == torch.float32
    assert torch.equal(video_scores(logits), video_scores(logits.float()))


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_top_k_agrees_with_counting_the_better_classes(k):
    scores, labels = torch.randn(40, 7), torch.randint(7, (40,))
    judged = judged_top_k(scores.tolist(), labels.tolist(), k)
    assert top_k_accuracy(scores, labels, k) == pytest.approx(judged)
    assert (judged == 1) == (k == 7)


def test_of_equal_scores_the_larger_number_is_the_higher():
    """As upstream, whose `argsort` leaves them in their order."""
    rows = [[0.2, 0.2, 0.2, 0.2, 0.2], [0.0, 0.5, 0.0, 0.5, 0.0], [0.3, 0.1, 0.3, 0.0, 0.3]]
    for k, chosen in (
        (1, [{4}, {3}, {4}]),
        (2, [{3, 4}, {1, 3}, {2, 4}]),
        (3, [{2, 3, 4}, {1, 3, 4}, {0, 2, 4}]),
    ):
        for row, best in zip(rows, chosen, strict=True):
            for label in range(5):
                hit = top_k_accuracy(torch.tensor([row]), torch.tensor([label]), k)
                assert hit == (label in best) == (label in np.argsort(row, kind="stable")[-k:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_finite_numbers_are_never_right(value):
    rows = torch.tensor([[value] * 3, [0.1, 0.2, value], [0.0, 0.0, 1.0]])
    assert top_k_accuracy(rows, torch.tensor([2, 2, 2]), 1) == pytest.approx(1 / 3)
    assert top_k_accuracy(rows, torch.tensor([2, 2, 2]), 3) == pytest.approx(1 / 3)


def test_top_k_beyond_the_number_of_classes_counts_them_all():
    scores, labels = torch.randn(10, 3), torch.randint(3, (10,))
    assert top_k_accuracy(scores, labels, 5) == 1


def test_mean_class_accuracy_agrees_with_counting():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        predicted, labels = torch.randint(9, (2, 12), generator=generator)
        judged = judged_mean_class(predicted.tolist(), labels.tolist())
        assert mean_class_accuracy(predicted, labels) == pytest.approx(judged)


def test_mean_class_accuracy_gives_rare_classes_the_same_weight():
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 4])
    assert mean_class_accuracy(torch.zeros(10, dtype=torch.int64), labels) == 0.5


def test_a_class_that_is_only_predicted_counts_zero():
    predicted, labels = torch.tensor([0, 1, 7]), torch.tensor([0, 1, 1])
    # Class 0 all, class 1 half, class 7 none of none.
    assert mean_class_accuracy(predicted, labels) == pytest.approx((1 + 0.5 + 0) / 3)


def test_without_videos_every_accuracy_is_nan():
    none = torch.empty(0, dtype=torch.int64)
    assert isnan(top_k_accuracy(torch.empty(0, 4), none, 1))
    assert isnan(top_k_accuracy(torch.empty(0, 1), none, 5))
    assert isnan(mean_class_accuracy(none, none))
