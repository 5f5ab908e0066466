"""EPG, IoU, box and object masks: examples by hand, undefined cases."""

import pytest
import torch

from pipelines.metrics import (
    THRESHOLDS,
    IoU,
    LocalisationMetric,
    area_share,
    attribution_iou,
    box_masks,
    energy_pointing_game,
    iou_by_threshold,
    measured,
    object_masks,
    select_boxes,
    size_corrected,
    without_energy,
    without_union,
)


def mask(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([rows])


def test_a_map_inside_the_mask_scores_1_outside_0_and_negative_parts_do_not_count():
    masks = mask([1, 1], [0, 0])
    inside = torch.tensor([[[3.0, 1.0], [-5.0, 0.0]]])
    assert energy_pointing_game(inside, masks).item() == 1
    assert energy_pointing_game(inside.flip(1), masks).item() == 0
    assert energy_pointing_game(
        torch.tensor([[[3.0, -9.0], [0.0, 1.0]]]), masks.bool()
    ).item() == pytest.approx(0.75)


def test_a_map_without_positive_part_scores_0_and_is_said_to_be_undefined():
    maps = torch.stack([torch.zeros(2, 2), -torch.ones(2, 2), torch.full((2, 2), 1e-3)])
    assert energy_pointing_game(maps, torch.ones(3, 2, 2)).tolist() == [0, 0, 1]
    assert without_energy(maps).tolist() == [True, True, False]


def test_a_uniform_map_scores_the_share_of_the_mask_and_0_once_corrected():
    masks = torch.zeros(1, 4, 5)
    masks[:, :2, :3] = 1
    scores = energy_pointing_game(torch.ones(1, 4, 5), masks)
    assert area_share(masks).item() == pytest.approx(0.3)
    torch.testing.assert_close(scores, area_share(masks))
    assert size_corrected(scores, area_share(masks)).item() == pytest.approx(0, abs=1e-6)
    assert size_corrected(torch.ones(2), torch.tensor([0.3, 1.0])).tolist() == [1, 0]


def test_iou_by_hand():
    maps = torch.tensor(
        [[[4.0, 3.0, 2.0, 0.0], [-8.0, 1.0, 2.1, 0.0]]]
    )  # scaled to 1, .75, .5, 0 / 0, .25, .525, 0
    masks = mask([1, 0, 1, 0], [1, 0, 0, 0])
    assert attribution_iou(maps, masks).item() == pytest.approx(
        1 / 5
    )  # a value of exactly one half does not count


def test_iou_scales_by_minimum_and_maximum_and_a_flat_map_counts_everywhere():
    raised = torch.tensor([[[10.0, 11.0], [12.0, 12.0]]])
    assert attribution_iou(raised, mask([0, 0], [1, 1])).item() == 1
    assert attribution_iou(torch.full((1, 2, 2), 5.0), mask([1, 0], [0, 0])).item() == pytest.approx(0.25)


def test_iou_at_each_threshold_is_that_of_the_map_binarised_there():
    torch.manual_seed(0)
    maps, masks = torch.randn(5, 6, 7).pow(3), torch.rand(5, 6, 7) > 0.6
    maps[3], masks[4] = -1, False
    positive = maps.clamp_min(0)
    least, largest = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
    scaled = (positive - least) / (largest - least).clamp_min(1e-30)
    expected = [
        ((scaled > t) & masks).sum((1, 2)) / ((scaled > t) | masks).sum((1, 2)).clamp_min(1)
        for t in THRESHOLDS
    ]
    torch.testing.assert_close(iou_by_threshold(maps, masks), torch.stack(expected, 1))
    torch.testing.assert_close(attribution_iou(maps, masks, 0.1), expected[THRESHOLDS.index(0.1)])
    maps[0, 0, 0] = torch.nan
    assert iou_by_threshold(maps, masks).isnan().all(1).tolist() == [True, False, False, False, False]


def peaked(strength: float) -> torch.Tensor:
    """A map whose weak pixels fill its right half, beside one strong pixel there."""
    maps = torch.zeros(1, 4, 4)
    maps[:, :, 2:] = strength
    maps[:, 0, 3] = 1
    return maps


def test_the_threshold_is_chosen_by_the_mean_over_all_images():
    masks = torch.zeros(1, 4, 4)
    masks[:, :, 2:] = 1
    metric = IoU()
    metric.update(peaked(0.06), masks)
    metric.update(peaked(0.015), masks)
    found = measured(metric.compute())
    assert (found["iou"], found["iou_threshold"]) == (1, pytest.approx(0.001))
    assert found["iou_at_0.5"] == pytest.approx(1 / 8)  # the strong pixel alone
    noisy = peaked(0.06)
    noisy[:, :3, :2] = 0.012  # above all thresholds below 0.02
    metric.update(noisy, masks)
    assert measured(metric.compute())["iou_threshold"] == pytest.approx(0.001)  # better for two of three maps
    for _ in range(3):
        metric.update(noisy, masks)
    assert measured(metric.compute())["iou_threshold"] == pytest.approx(0.02)


def test_the_chosen_threshold_does_not_depend_on_how_batches_are_split():
    torch.manual_seed(0)
    maps, masks = torch.randn(60, 8, 8).pow(5), torch.rand(60, 8, 8) > 0.7
    whole, parts = IoU(), [IoU(), IoU()]
    whole.update(maps, masks)
    for index, start in enumerate(range(0, 60, 13)):
        parts[index % 2].update(maps[start : start + 13], masks[start : start + 13])
    parts[0].merge_state(parts[1])
    assert measured(parts[0].compute()) == pytest.approx(measured(whole.compute()), abs=1e-9)


def test_an_empty_union_scores_0_and_is_said_to_be_undefined():
    maps, masks = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    masks[1, 0, 0] = 1
    assert attribution_iou(maps, masks).tolist() == [0, 0]
    assert without_union(maps, masks).tolist() == [True, False]


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        energy_pointing_game(torch.ones(1, 2, 2), torch.ones(1, 4, 4))


def test_box_masks_are_the_half_open_union_of_the_boxes_of_the_class():
    boxes = torch.tensor(
        [[0, 1, 0, 0, 2, 1], [0, 1, 1, 0, 3, 2], [0, 2, 0, 0, 4, 3], [2, 2, 0.6, 0.4, 2.5, 3.0]],
        dtype=torch.float32,
    )
    masks = box_masks(boxes, torch.tensor([1, 1, 2]), (3, 4))
    assert masks[0].int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert not masks[1].any()
    assert masks[2].int().tolist() == [[0, 1, 0, 0]] * 3
    assert box_masks(boxes, torch.tensor([0, 0, 0]), (3, 4)).sum() == 0
    assert not box_masks(boxes[:0], torch.tensor([1, 1, 2]), (3, 4)).any()
    assert box_masks(boxes[:0], torch.zeros(0, dtype=torch.long), (3, 4)).shape == (
        0,
        3,
        4,
    )  # no image has a label


def test_object_masks_are_the_union_of_the_instances_of_the_class():
    instances = torch.tensor([[[0, 1, 2], [3, 3, 0]], [[1, 0, 2], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]]])
    boxes = torch.tensor([[0, 4.0, 0, 0, 1, 1], [0, 7, 0, 0, 1, 1], [0, 4, 0, 0, 1, 1], [2, 4, 0, 0, 1, 1]])
    masks = object_masks(instances, boxes, torch.tensor([4, 4, 4]))
    assert masks.int().tolist() == [[[0, 1, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]]]
    assert not object_masks(instances, boxes, torch.tensor([7, 7, 7]))[1:].any()
    assert not object_masks(instances, boxes[:0], torch.tensor([4, 4, 4])).any()
    assert object_masks(instances[:0], boxes[:0], torch.zeros(0, dtype=torch.long)).shape == (0, 2, 3)


def test_selected_boxes_count_through_the_images_that_were_selected():
    boxes = torch.tensor([[0, 4.0, 0, 0, 1, 1], [0, 7, 0, 0, 2, 2], [2, 4, 0, 0, 3, 3], [2, 4, 0, 0, 4, 4]])
    images, classes = torch.tensor([2, 0, 1, 2]), torch.tensor([4, 7, 4, 7])
    every = select_boxes(boxes, images)
    assert every[:, [0, 5]].tolist() == [[0, 3], [0, 4], [1, 1], [1, 2], [3, 3], [3, 4]]
    assert select_boxes(boxes, images, classes)[:, [0, 1, 5]].tolist() == [[0, 4, 3], [0, 4, 4], [1, 7, 2]]
    assert (
        select_boxes(boxes[:0], images, classes).shape
        == select_boxes(boxes, images[:0], classes[:0]).shape
        == (0, 6)
    )
    size = (5, 5)
    assert torch.equal(
        box_masks(every, classes, size), box_masks(select_boxes(boxes, images, classes), classes, size)
    )


def test_the_mean_does_not_depend_on_how_batches_are_split_over_workers():
    scores, undefined = torch.rand(1000), torch.rand(1000) < 0.1
    whole = LocalisationMetric()
    whole.update(scores, undefined)
    parts = [LocalisationMetric() for _ in range(3)]
    for index, start in enumerate(range(0, 1000, 37)):
        parts[index % 3].update(scores[start : start + 37], undefined[start : start + 37])
    for part in parts[1:]:
        parts[0].merge_state(part)
    merged, expected = parts[0].compute(), whole.compute()
    assert abs(merged["mean"] - expected["mean"]) < 1e-12
    assert merged["count"] == 1000
    assert merged["undefined"] == expected["undefined"] == undefined.sum()
