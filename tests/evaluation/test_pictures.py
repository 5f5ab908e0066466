"""Pictures: the choice of images, the meaning of colours, reproducible files."""

import pytest
import torch
from matplotlib.image import imread

from pipelines.evaluation import pictures
from pipelines.evaluation.pictures import Column, choose, heat_map, on_white, save_panels


def test_half_of_the_chosen_images_are_wrong_where_possible():
    correct = torch.ones(40, dtype=torch.bool)
    correct[:10] = False
    chosen = choose(correct, 8, seed=3)
    assert (~correct[chosen]).sum() == 4
    assert len(set(chosen.tolist())) == 8
    assert torch.equal(chosen, choose(correct, 8, seed=3))
    assert not torch.equal(chosen, choose(correct, 8, seed=4))


@pytest.mark.parametrize(
    ("right", "wrong", "expected"), [(20, 1, (7, 1)), (2, 20, (2, 6)), (3, 2, (3, 2)), (20, 0, (8, 0))]
)
def test_where_one_kind_runs_out_the_other_fills_up(right, wrong, expected):
    correct = torch.cat([torch.ones(right), torch.zeros(wrong)]).bool()
    chosen = choose(correct, 8, seed=0)
    assert (correct[chosen].sum().item(), (~correct[chosen]).sum().item()) == expected


def test_heat_map_is_white_at_zero_red_above_blue_below_and_symmetric():
    maps = torch.tensor([[[0.0, 2.0], [-2.0, 1.0]]])
    colours = heat_map(maps, percentile=100)[0]
    assert torch.allclose(colours[0, 0], torch.ones(3), atol=0.01)
    assert torch.allclose(colours[0, 1], torch.tensor([1.0, 0.0, 0.0]), atol=0.01)
    assert torch.allclose(colours[1, 0], torch.tensor([0.0, 0.0, 1.0]), atol=0.01)
    assert torch.allclose(heat_map(-maps, percentile=100).flip(-1), heat_map(maps, percentile=100), atol=0.01)


def test_a_zero_map_is_white():
    assert torch.allclose(heat_map(torch.zeros(1, 4, 4)), torch.ones(1, 4, 4, 3), atol=0.01)


def test_transparent_is_white():
    rgba = torch.tensor([0.2, 0.4, 0.6, 0.0]).expand(1, 2, 2, 4)
    assert torch.equal(on_white(rgba), torch.ones(1, 2, 2, 3))
    assert torch.allclose(on_white(torch.tensor([[[[0.2, 0.4, 0.6, 1.0]]]])), torch.tensor([0.2, 0.4, 0.6]))


def test_panels_are_the_same_bytes_each_time_and_show_the_image(tmp_path):
    images = torch.zeros(2, 6, 8, 8)
    images[:, 0] = 1  # red
    columns = [
        Column(torch.rand(2, 8, 8, 4), ["a", "b"]),
        Column(torch.randn(2, 8, 8), ["a", "b"], contributions=True),
    ]
    for name in ("a", "b"):
        save_panels(tmp_path / "new" / f"{name}.png", images, columns, ["one", "two"])
    first, second = ((tmp_path / "new" / f"{name}.png").read_bytes() for name in ("a", "b"))
    assert first == second
    picture = imread(tmp_path / "new" / "a.png")
    height, width, _ = picture.shape
    assert picture[height // 4, width // 6].tolist() == [1, 0, 0, 1]


def test_wrong_numbers_and_shapes_are_named(tmp_path):
    images = torch.rand(2, 6, 8, 8)
    with pytest.raises(ValueError, match="titles: 1 for 2 images"):
        save_panels(tmp_path / "a.png", images, [], ["one"])
    with pytest.raises(ValueError, match="column 0: titles: 1 for 2 images"):
        save_panels(tmp_path / "a.png", images, [Column(images[:, 0], ["gradcam"])], ["one", "two"])
    with pytest.raises(ValueError, match=r"maps: .*not \(2, 6, 8, 8\)"):
        save_panels(tmp_path / "a.png", images, [Column(images, ["a", "b"])], ["one", "two"])


def test_contributions_of_one_image_share_a_scale_and_other_maps_do_not(tmp_path, monkeypatch):
    shown = []
    drawn = pictures.heat_map
    monkeypatch.setattr(pictures, "heat_map", lambda *a, **k: shown.append(drawn(*a, **k)) or shown[-1])
    large, small = torch.full((2, 8, 8), 4.0), torch.full((2, 8, 8), 1.0)
    columns = [
        Column(large, ["a", "b"], contributions=True),
        Column(small, ["a", "b"], contributions=True),
        Column(small, ["a", "b"]),
    ]
    save_panels(tmp_path / "a.png", torch.rand(2, 6, 8, 8), columns, ["one", "two"])
    full, quarter, own = (maps[0, 0, 0].tolist() for maps in shown)
    assert full == own == pytest.approx([1, 0, 0], abs=0.01)
    assert quarter == pytest.approx([1, 0.75, 0.75], abs=0.01)
