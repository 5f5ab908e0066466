"""Means of rows of scores."""

import math

import pytest

from pipelines.evaluation.rows import image_means, mean_scores, row, sampled


def test_undefined_scores_are_absent_and_images_have_equal_weight():
    rows = [
        row("b", "m", 0, "e", {"score": 1.0, "other": math.nan}),
        row("a", "m", 0, "e", {"score": 0.0}),
        row("a", "m", 3, "e", {"score": 0.5, "other": 2.0}),
        row("a", "m", 4, "e", {"score": math.nan}),
    ]
    assert "other" not in rows[0]
    assert image_means(rows, "score") == {"a": 0.25, "b": 1.0}
    expected = {"score": 0.625, "score_images": 2, "other": 2.0, "other_images": 1}
    assert mean_scores(rows) == {"m": {"e": expected}}


def test_a_score_that_no_row_has_is_absent():
    assert mean_scores([row("a", "m", 0, "e", {"score": math.nan})]) == {"m": {"e": {}}}
    assert mean_scores([]) == {}


def test_a_sample_is_seeded_and_ascending():
    drawn = sampled(1000, 50, seed=3)
    assert drawn == sorted(set(drawn)) == sampled(1000, 50, seed=3)
    assert len(drawn) == 50
    assert drawn != sampled(1000, 50, seed=4)
    assert sampled(4, 50, seed=0) == [0, 1, 2, 3]
    assert pytest.approx(500, abs=120) == sum(drawn) / 50
