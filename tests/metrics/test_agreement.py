"""Agreement of predictions and similarity of explanations."""

import pytest
import torch

from pipelines.metrics import Agreement, agreement, explanation_similarity


def test_agreement_is_the_share_of_equal_top_1():
    student = torch.tensor([[1.0, 0], [0, 1], [5, 1], [0, 2]])
    teacher = torch.tensor([[9.0, 8], [0, 1], [1, 5], [-2, -1]])
    assert agreement(student, teacher).item() == 0.75
    assert agreement(3 * student - 1, student).item() == 1


def test_similarity_is_a_cosine_of_whole_maps():
    maps = torch.randn(3, 6, 4, 4)
    torch.testing.assert_close(explanation_similarity(2.5 * maps, maps), torch.ones(3))
    torch.testing.assert_close(explanation_similarity(-maps, maps), -torch.ones(3))
    assert explanation_similarity(torch.zeros(1, 4, 4), torch.ones(1, 4, 4)).item() == 0
    left, right = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    left[0, 0, 0], right[0, 0, :] = 1, 1
    assert explanation_similarity(left, right).item() == pytest.approx(0.5**0.5)


def test_agreement_over_uneven_batches_is_that_of_the_whole():
    student, teacher, metric = torch.randn(23, 4), torch.randn(23, 4), Agreement()
    for one, other in zip(student.split(5), teacher.split(5), strict=True):
        metric.update(one, other)
    assert metric.compute() == agreement(student, teacher)
