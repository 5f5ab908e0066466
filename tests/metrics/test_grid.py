"""The grid pointing game: drawing, tiling and scoring of grids; the batched version against a loop."""

from functools import partial

import pytest
import torch

from pipelines.attribution import attribute
from pipelines.bcos import add_inverse, bcosify
from pipelines.metrics import (
    confidence,
    draw_grids,
    eligible,
    grid_batches,
    grid_pointing_game,
    grid_scores,
    in_windows,
    tile,
)
from pipelines.models import ConventionalNetwork, build
from pipelines.models.cifar import CifarResNet

COUNT, CLASSES = 60, 6


@pytest.fixture
def population():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (COUNT,), generator=generator)
    return (
        torch.rand(COUNT, generator=generator),
        labels,
        [f"key{i:03}" for i in range(COUNT)],
        torch.ones(COUNT).bool(),
    )


def test_grids_have_distinct_classes_and_no_image_twice(population):
    confidences, labels, keys, allowed = population
    allowed[::3] = False
    grids = draw_grids(confidences, labels, keys, allowed, n=2, count=5, seed=1)
    assert len(grids) == 5
    for grid in grids:
        assert len(set(grid.classes)) == 4
        assert labels[list(grid.images)].tolist() == list(grid.classes)
    used = [image for grid in grids for image in grid.images]
    assert len(set(used)) == len(used)
    assert allowed[used].all()


def test_each_class_gives_its_most_confident_images_first(population):
    confidences, labels, keys, allowed = population
    grids = draw_grids(confidences, labels, keys, allowed, n=2, count=4, seed=1)
    used = torch.tensor([image for grid in grids for image in grid.images])
    for label in range(CLASSES):
        mine = confidences[used[labels[used] == label]]
        assert mine.tolist() == sorted(confidences[labels == label].tolist(), reverse=True)[: len(mine)]


def test_grids_depend_on_the_seed_and_not_on_the_order_of_the_images(population):
    confidences, labels, keys, allowed = population
    confidences = (confidences * 4).round() / 4  # with ties
    draw = partial(draw_grids, n=2, count=5)
    grids = draw(confidences, labels, keys, allowed, seed=1)
    assert grids == draw(confidences, labels, keys, allowed, seed=1)
    assert grids != draw(confidences, labels, keys, allowed, seed=2)
    order = torch.randperm(COUNT)
    shuffled = draw(confidences[order], labels[order], [keys[i] for i in order], allowed, seed=1)
    assert [[keys[i] for i in grid.images] for grid in grids] == [
        [keys[order[i]] for i in grid.images] for grid in shuffled
    ]


def test_drawing_ends_when_too_few_classes_have_images_left(population):
    confidences, labels, keys, allowed = population
    grids = draw_grids(confidences, labels, keys, allowed, n=2, count=1000, seed=0)
    left = torch.bincount(labels, minlength=CLASSES)
    for grid in grids:
        left[list(grid.classes)] -= 1
    assert (left >= 0).all()
    assert (left > 0).sum() < 4
    assert draw_grids(confidences, labels, keys, allowed, n=3, count=10, seed=0) == []


def test_eligible_images_are_right_and_confident_for_every_model():
    labels = torch.tensor([0, 1, 0, 1])
    first = torch.tensor([[2.0, -1], [-1, 2], [2, 1], [-3, -2]])
    second = torch.tensor([[2.0, -1], [3, 2], [1, -1], [1, 2]])
    assert eligible(labels, first).tolist() == [True, True, True, False]  # the last has sigmoid(-2) < 0.5
    assert eligible(labels, first, second).tolist() == [True, False, True, False]
    expected = (first.double().sigmoid()[range(4), labels] + second.double().sigmoid()[range(4), labels]) / 2
    torch.testing.assert_close(confidence(labels, first, second), expected)


def test_tiles_lie_row_by_row():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 6, 2, 3)
    grid = tile(images)
    assert grid.shape == (6, 4, 6)
    assert grid[0, ::2, ::3].tolist() == [[0, 1], [2, 3]]
    picture = torch.rand(9, 2, 4, 4)
    assert torch.equal(tile(picture)[:, 4:8, 8:12], picture[5])
    with pytest.raises(ValueError, match="n × n cells"):
        tile(torch.rand(3, 6, 2, 2))


@pytest.mark.parametrize("n", [2, 3])
def test_a_map_on_its_own_cell_scores_1_and_a_uniform_one_chance(n):
    cells = torch.eye(n * n)[:, :, None, None, None].expand(-1, -1, 1, 6, 6)
    own = tile(cells).squeeze(1)[None]  # map j is 1 in cell j
    assert torch.equal(grid_scores(own, 1), torch.ones(1, n * n))
    assert (grid_scores(own, 3) < 1).all()  # smoothing spills over
    torch.testing.assert_close(
        grid_scores(torch.ones(2, n * n, 6 * n, 6 * n), 1), torch.full((2, n * n), 1 / n**2)
    )
    assert torch.equal(grid_scores(-own, 1), torch.zeros(1, n * n))
    with pytest.raises(ValueError, match="odd"):
        grid_scores(own, 2)


def test_random_maps_score_chance():
    maps = torch.randn(50, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert grid_scores(maps, 3).mean().item() == pytest.approx(0.25, abs=0.005)


def test_smoothing_is_of_the_signed_map():
    maps = torch.zeros(1, 4, 8, 8)
    # Their mean is negative, so only pixels whose window leaves out the -3 stay positive.
    maps[:, :, 1, 1], maps[:, :, 1, 2] = (
        1,
        -3,
    )
    scores = grid_scores(maps, 3)
    assert scores[0].tolist() == [1, 0, 0, 0]
    maps[:, :, 1, 0] = -3
    assert grid_scores(maps, 3)[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("method", ["bcos", "input_x_gradient", "gradcam"])
def test_batched_scores_are_those_of_a_loop_over_grids_and_classes(method, population):
    torch.manual_seed(0)
    network = CifarResNet(8, CLASSES, width=4)
    model = (bcosify(network) if method == "bcos" else ConventionalNetwork(network)).eval()
    images = add_inverse(torch.rand(COUNT, 3, 16, 16))
    confidences, labels, keys, allowed = population
    grids = draw_grids(confidences, labels, keys, allowed, n=2, count=5, seed=0)
    play = partial(grid_pointing_game, partial(attribute, model, method=method), smooth=3)
    batches = list(grid_batches(grids, lambda indices: images[list(indices)], batch_size=2))
    assert [len(classes) for _, classes in batches] == [2, 2, 1]
    scores = torch.cat([play(*batch) for batch in batches])
    for grid, row in zip(grids, scores, strict=True):
        picture = tile(images[list(grid.images)])[None]
        for cell, (label, score) in enumerate(zip(grid.classes, row, strict=True)):
            contribution = attribute(model, picture, torch.tensor([label]), method=method)
            smooth = torch.nn.functional.avg_pool2d(contribution, 3, 1, 1)[0].clamp_min(0)
            top, left = divmod(cell, 2)
            own = smooth[16 * top : 16 * top + 16, 16 * left : 16 * left + 16].sum()
            expected = own / smooth.sum() if smooth.sum() > 0 else torch.tensor(0.0)
            torch.testing.assert_close(score, expected, atol=1e-5, rtol=0)


def test_all_classes_of_a_grid_cost_one_forward_pass():
    torch.manual_seed(0)
    model = bcosify(CifarResNet(8, CLASSES, width=4)).eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    grid_pointing_game(
        partial(attribute, model), torch.rand(2, 6, 32, 32), torch.tensor([[0, 1, 2, 3]] * 2), smooth=3
    )
    assert len(calls) == 1


def test_windows_cover_each_pixel_four_times():
    images, classes = torch.rand(3, 6, 24, 16), torch.tensor([[0, 1, 2, 3]] * 3)
    sizes = []

    def explain(windows, targets):
        sizes.append(tuple(windows.shape))
        return windows.sum(1, keepdim=True) * targets[:, :, None, None]

    maps = in_windows(explain, 8)(images, classes)
    torch.testing.assert_close(maps, 4 * explain(images, classes))
    assert {size[1:] for size in sizes[:-1]} == {(6, 8, 8)}
    assert sum(size[0] for size in sizes[:-1]) == 3 * (2 * 3 + 1) * (2 * 2 + 1)
    assert max(size[0] for size in sizes[:-1]) == 3 * 3 * 2  # as many pixels as the images


def test_windows_of_a_vit_are_those_of_a_loop():
    torch.manual_seed(0)
    model = bcosify(
        build("simple_vit_ti", num_classes=5, options={"dim": 24, "depth": 1, "heads": 2, "patch_size": 4})
    ).eval()
    images, classes = add_inverse(torch.rand(2, 3, 32, 32)), torch.tensor([[0, 1, 4], [3, 2, 1]])
    maps = in_windows(partial(attribute, model, method="bcos"), 16)(images, classes)
    expected = torch.zeros(2, 3, 48, 48)
    for image in range(2):
        padded = torch.nn.functional.pad(images[image], (8, 8, 8, 8))
        for target in range(3):
            for top in range(0, 33, 8):
                for left in range(0, 33, 8):
                    window = padded[None, :, top : top + 16, left : left + 16]
                    own = attribute(model, window, classes[image, target, None], method="bcos")[0]
                    expected[image, target, top : top + 16, left : left + 16] += own
    torch.testing.assert_close(maps, expected[:, :, 8:40, 8:40], rtol=1e-4, atol=1e-6)


def test_windows_that_would_not_cover_the_image():
    with pytest.raises(ValueError, match="even: not 7"):
        in_windows(lambda *_: None, 7)
    with pytest.raises(ValueError, match="multiples of 4, half the window: not 24 × 18"):
        in_windows(lambda *_: None, 8)(torch.rand(1, 6, 24, 18), torch.tensor([[0]]))
