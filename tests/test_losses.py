import math

import pytest
import torch
import torch.nn.functional as F

from pipelines import losses


def test_off_label_targets_are_one_over_the_classes():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 4, 2])
    targets = torch.full((4, 5), 0.2)
    targets[range(4), labels] = 1
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(losses.uniform_off_label_bce(logits, labels), expected)
    torch.testing.assert_close(losses.uniform_off_label_bce(logits, F.one_hot(labels, 5)), expected)
    plain = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 5).float())
    torch.testing.assert_close(losses.uniform_off_label_bce(logits, labels, off_label=0.0), plain)


def test_distillation_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    p = 1 / (1 + math.exp(-1))  # of the first class at temperature 2
    expected = 4 * (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5))
    assert losses.distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert losses.distillation_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-7)


def test_distillation_of_several_labels_by_hand():
    student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]])
    p = 1 / (1 + math.exp(-1))  # of the first class at temperature 2; the second class adds no loss
    expected = 4 * (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5))
    assert losses.binary_distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert losses.binary_distillation_loss(teacher, teacher, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_explanation_loss_is_one_minus_cosine():
    maps = torch.tensor([[[1.0, 0], [0, 0]], [[1, 0], [0, 0]], [[1, 0], [0, 0]]])
    other = torch.tensor([[[3.0, 0], [0, 0]], [[0, 2], [0, 0]], [[-1, 0], [0, 0]]])
    torch.testing.assert_close(losses.explanation_loss(maps, other), torch.tensor([0.0, 1.0, 2.0]))


MAPS = torch.tensor([[[2.0, -1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
MASKS = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses.energy_loss, [1 - 3 / 4, 1.0]),
        (losses.l1_loss, [(0 + 0 + 0.5 + 0.5) / 4, 1 / 4]),
        (losses.rrr_loss, [0.25 + 0.25, 0.0]),
        (losses.ppce_loss, [-math.log(0.5) / 2, 100.0]),
        (losses.size_corrected_energy_loss, [1 - 3 / 4 / math.sqrt(1 / 2), 1.0]),
    ],
)
def test_localisation_losses_by_hand(loss, expected):
    torch.testing.assert_close(loss(MAPS, MASKS), torch.tensor(expected))


LOCALISATION = [
    losses.energy_loss,
    losses.l1_loss,
    losses.rrr_loss,
    losses.ppce_loss,
    losses.size_corrected_energy_loss,
]


@pytest.mark.parametrize("loss", LOCALISATION)
def test_localisation_losses_are_of_each_image_and_have_finite_gradients(loss):
    torch.manual_seed(0)
    maps, masks = torch.randn(3, 4, 4), (torch.rand(3, 8, 8) > 0.5).float()
    maps[1] = 0
    masks[2] = 0
    maps.requires_grad_()
    values = loss(maps, masks)
    assert values.shape == (3,)
    torch.testing.assert_close(values[:1], loss(maps[:1], masks[:1]))
    values.sum().backward()
    assert maps.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_size_corrected_energy_loss_is_that_of_sauter_et_al(alpha):
    torch.manual_seed(0)
    maps, masks = torch.randn(3, 8, 8), torch.zeros(3, 8, 8)
    masks[0, :, :4], masks[1, 2:, 1:], masks[2] = 1, 1, 1
    energy, area = 1 - losses.energy_loss(maps, masks), masks.mean((1, 2))
    torch.testing.assert_close(
        losses.size_corrected_energy_loss(maps, masks, alpha), 1 - energy / area**alpha
    )


SIDE = 224
PIXELS = {  # case -> number of pixels in the mask, which are the first ones
    "2 % outside": round(0.98 * SIDE**2),
    "one pixel outside": SIDE**2 - 1,
    "2 % inside": round(0.02 * SIDE**2),
    "one pixel inside": 1,
    "all": SIDE**2,
    "none": 0,
}


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("pixels", PIXELS.values(), ids=PIXELS)
def test_the_gradient_of_the_size_corrected_loss_is_at_most_5_times_the_energy_losses(pixels, alpha):
    mask = (torch.arange(SIDE**2) < pixels).float().view(1, SIDE, SIDE)
    maps = torch.randn(1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (plain,) = torch.autograd.grad(losses.energy_loss(maps, mask).sum(), maps)
    value = losses.size_corrected_energy_loss(maps, mask, alpha)
    (corrected,) = torch.autograd.grad(value.sum(), maps)
    assert corrected.norm() <= 5.001 * plain.norm()
    assert -4 <= value.item() <= 1


def test_an_empty_mask_costs_nothing_in_ppce():
    assert losses.ppce_loss(MAPS[:1], torch.zeros(1, 2, 2)).item() == 0


def test_siglip_by_hand():
    one, other = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    pairs = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # cosines
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    expected = -F.logsigmoid(signs * (10 * pairs - 10)).sum() / 2
    torch.testing.assert_close(losses.siglip_loss(one, other, 10.0, -10.0), expected)


def test_siglip_of_targets_in_any_order_with_rows_of_zeros_between():
    torch.manual_seed(0)
    features, targets = (
        torch.randn(300, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(700, 5, dtype=torch.float64),
    )
    targets[100:150] = 0
    own = torch.cat([torch.arange(200, 350), torch.arange(99, -1, -1), torch.arange(650, 700)])
    present = targets.abs().sum(1) > 0
    cosines = F.normalize(features, dim=1) @ F.normalize(targets, dim=1).T
    signs = 2 * F.one_hot(own, 700) - 1
    expected = -(F.logsigmoid(signs * (8 * cosines - 3)) * present).sum() / 300
    found = losses.siglip_loss(features, targets, 8.0, -3.0, own)
    torch.testing.assert_close(found, expected)
    (wanted,), (gradient,) = (torch.autograd.grad(3 * loss, features) for loss in (expected, found))
    torch.testing.assert_close(gradient, wanted)


def test_info_nce_and_cosine_by_hand():
    one, other = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    logits = torch.tensor([[10.0, 10.0], [0.0, 0.0]])
    own = torch.arange(2)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(losses.info_nce_loss(one, other, 0.1), expected)
    assert losses.cosine_embedding_loss(one, other).item() == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_no_positive_number_is_refused(scale):
    pair = torch.ones(2, 2), torch.ones(2, 2)
    with pytest.raises(ValueError, match="scale"):
        losses.siglip_loss(*pair, scale, -10.0)
    with pytest.raises(ValueError, match="temperature"):
        losses.info_nce_loss(*pair, scale)
