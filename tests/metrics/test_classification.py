"""Classification metrics: examples by hand, at the threshold, for any split among workers."""

import pytest
import torch

from pipelines.metrics import CalibrationError, multiclass_metrics, multilabel_metrics


def merged(make, batches, workers):
    """Deals batches in turn to one metric per worker and merges the states."""
    parts = [make() for _ in range(workers)]
    for index, batch in enumerate(batches):
        parts[index % workers].update(*batch)
    for part in parts[1:]:
        if hasattr(parts[0], "merge_state"):
            parts[0].merge_state(part)
        else:
            for name, metric in parts[0].items(copy_state=False):
                metric.merge_state(part[name])
    return parts[0].compute()


@pytest.mark.parametrize("workers", [2, 3])
def test_results_do_not_depend_on_the_number_of_workers(workers):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 8), torch.randint(8, (500,))
    multi_hot = (torch.rand(500, 8) < 0.3).long()
    cases = [
        (lambda: multiclass_metrics(8), (logits, labels)),
        (lambda: multilabel_metrics(8), (logits, multi_hot)),
    ]
    for make, tensors in cases:
        batches = list(zip(*(tensor.split(33) for tensor in tensors), strict=True))
        whole, parts = merged(make, [tensors], 1), merged(make, batches, workers)
        assert whole.keys() == parts.keys()
        for name, value in whole.items():
            assert abs(value - parts[name]) <= 1e-7, name


def test_accuracies_by_hand():
    logits = torch.eye(8)[[0, 1, 2, 3]] * 5 - torch.arange(8) * 0.1
    metrics = multiclass_metrics(8)
    metrics.update(logits, torch.tensor([0, 1, 3, 7]))  # ranks 1, 1, 4 and 8 of the labels
    values = metrics.compute()
    assert values["accuracy"] == 0.5
    assert values["accuracy_top5"] == 0.75
    assert "accuracy_top5" not in multiclass_metrics(5)


def test_a_logit_of_0_counts_as_positive_whatever_the_range_of_the_batch():
    metrics = multilabel_metrics(2)
    metrics.update(torch.tensor([[0.0, 0.3], [0.9, -0.1]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    values = metrics.compute()
    assert values["precision"].item() == pytest.approx(2 / 3)
    assert values["recall"].item() == pytest.approx(2 / 3)
    assert values["f1"].item() == pytest.approx(2 / 3)


def test_calibration_error_by_hand():
    confidences = torch.tensor(
        [0.7, 0.7, 0.7, 0.95, 1.0]
    )  # in two of fifteen bins, [.667, .733) and the last
    logits = torch.stack([confidences.logit().clamp_max(60), torch.zeros(5)], dim=1)
    metric = CalibrationError()
    metric.update(logits, torch.tensor([0, 1, 1, 0, 0]))
    expected = 3 / 5 * abs(1 / 3 - 0.7) + 2 / 5 * abs(1 - 0.975)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
    metric.update(torch.full((1, 2), torch.nan), torch.tensor([0]))
    assert metric.compute().isnan()
