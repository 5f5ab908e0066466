"""Scores by removal of objects, against values computed by hand."""

import math

import pytest
import torch

from pipelines.metrics import (
    IMPORTANCE_THRESHOLDS,
    data_check,
    distractibility,
    important,
    names_most_important,
    removal_correlation,
    target_sensitivity,
)

NAN = math.nan


def tensor(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def assert_equal(found: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_removal_correlation_maps_rank_correlation_to_shares():
    drops = tensor([3, 1, 2], [3, 1, 2], [3, 1, 2], [1, 1, 1], [3, 1, NAN])
    attributions = tensor([0.9, -0.1, 0.3], [-3, -1, -2], [3, 2, 1], [1, 2, 3], [3, 1, 2])
    assert_equal(removal_correlation(attributions, drops), [1, 0, 0.75, NAN, NAN])
    assert removal_correlation(tensor([1.0]), tensor([1.0])).isnan().all()


def test_a_linear_model_is_explained_perfectly_by_its_own_terms():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    image, background = torch.rand(2, 24, generator=generator, dtype=torch.float64)
    parts = torch.eye(6, dtype=torch.bool).repeat_interleave(4, dim=1)  # (E, pixels)
    drops = torch.stack([weights @ (image - torch.where(part, background, image)) for part in parts], dim=1)
    attributions = (weights * (image - background)) @ parts.double().T
    assert_equal(removal_correlation(attributions, drops), [1, 1])
    assert_equal(removal_correlation(-attributions, drops), [0, 0])
    assert_equal(names_most_important(attributions, drops), [1, 1])


def test_the_most_important_object():
    drops = tensor([2, 1, 0], [2, 1, 0], [2, 1, 0], [2, 2, 0], [-1, -2, -3], [2, 1, NAN])
    attributions = tensor([5, 4, 3], [4, 5, 3], [0, 0, 0], [5, 4, 3], [5, 4, 3], [5, 4, 3])
    assert_equal(names_most_important(attributions, drops), [1, 0, 1 / 3, NAN, NAN, NAN])
    assert_equal(names_most_important(tensor([NAN, 1]), tensor([1, 0])), [NAN])
    assert_equal(names_most_important(tensor([3.0], [1.0]), tensor([1.0], [2.0])), [NAN, NAN])


def test_important_elements_are_above_a_share_of_the_energy():
    found = important(tensor([5, 1, -1]), torch.tensor([10.0], dtype=torch.float64))
    assert found.shape == (1, 80, 3)
    bounds = 10 * torch.tensor(IMPORTANCE_THRESHOLDS, dtype=torch.float64)
    assert torch.equal(found[0, :, 1], bounds < 1)
    assert not found[0, :, 2].any()
    assert (IMPORTANCE_THRESHOLDS[0], IMPORTANCE_THRESHOLDS[-1]) == pytest.approx((0.01, 0.5))


def test_a_map_without_energy_has_no_important_element():
    assert not important(tensor([0, 0, -1]), torch.zeros(1, dtype=torch.float64)).any()


def test_one_object_of_the_class_is_enough_data():
    chosen = torch.tensor([[[True, False, False], [False, True, False]]])
    assert_equal(data_check(chosen, torch.tensor([[True, False, True]])), [[1, 0]])


def test_distractibility_counts_irrelevant_elements_that_are_called_important():
    drops = tensor([4, 0.1, -1, 0.5], [4, 3, 2, 1], [4, 0.1, -1, 0.5])
    chosen = torch.tensor([[[True, True, False, True]], [[True] * 4], [[True] * 4]])
    evidence = torch.tensor([4.0, 4.0, -4.0], dtype=torch.float64)
    assert_equal(distractibility(chosen, drops, evidence), [[0.5], [NAN], [NAN]])


def test_target_sensitivity_compares_the_maps_of_two_classes_on_the_objects_of_one():
    drops = tensor([2, 0], [0, 2])
    assert_equal(target_sensitivity(tensor([5, 1], [1, 5]), drops), [1, 1])
    assert_equal(target_sensitivity(tensor([5, 1], [6, 5]), drops), [0, 1])
    assert_equal(target_sensitivity(tensor([1, 1], [1, 1]), drops), [0, 0])  # the same map for both
    assert_equal(target_sensitivity(tensor([5, 1], [1, 5]), tensor([2, 3], [0, 2])), [NAN, NAN])
    assert_equal(target_sensitivity(tensor([5.0]), tensor([2.0])), [NAN])


def test_target_sensitivity_averages_over_other_classes():
    drops = tensor([2, 0, 0], [0, 2, 0], [0, 3, 2])  # class 2 is not told from class 1
    attributions = tensor([5, 1, 1], [6, 5, 1], [1, 1, 5])
    assert_equal(target_sensitivity(attributions, drops), [0.5, 1, 1])
