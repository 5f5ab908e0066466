"""Explanations against the removal of single objects from a scene, which is drawn again without them.

C classes that have an object in the image, E elements of the scene (its objects, then its pieces of clutter),
T thresholds, H x W pixels. `drops` (..., E) are logit of the class - logit of the class without the element.

The protocols are those of FunnyBirds, with the objects of a scene in the role of a bird's parts. They differ:

- The parts of a bird make its class together, so that each removal lowers the logit. An object has a class of
  its own. Its removal lowers the logit of this class, and hardly changes the others. So the order of the
  other objects by their drops is often that of small side effects.
- A bird has five parts, and a rank correlation over them has many values. Over two objects it is 0 or 1.
- FunnyBirds explains one class per image. Here, each class that has an object in the image is explained.
- FunnyBirds sums attributions over part masks dilated by two pixels. Here, an element's footprint is the set
  of pixels of the network's input that its removal changes: what is visible of it, with its antialiased rim.
  The footprints of objects that touch share this rim.
- Removing all but the last object stays in the domain, because scenes have different numbers of objects. An
  image without any object is not in it.

Clutter has the role of FunnyBirds' background objects. It belongs to no class, but that does not mean that
the network ignores it: an explanation that shows what a network wrongly uses is correct. So no score requires
that clutter gets no attribution. `distractibility` requires it of the elements, clutter or not, whose removal
does not lower the logit.

Source: Hesse, Schaub-Meyer, Roth, FunnyBirds, ICCV 2023, and its code, visinf/funnybirds-framework.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.metrics.rank_correlation import rank_correlation

# Shares of a map's energy above which an element counts as important, the same 80 as in FunnyBirds.
IMPORTANCE_THRESHOLDS: tuple[float, ...] = tuple(torch.linspace(0.01, 0.5, 80, dtype=torch.float64).tolist())
IRRELEVANT = 0.05  # share of the evidence of all objects below which a drop counts as none


def removal_correlation(attributions: Tensor, drops: Tensor) -> Tensor:
    """Correctness: rank correlation of attributions and drops of the elements, mapped to [0, 1]: (...).

    Chance is 0.5. NaN with fewer than two elements, if all attributions or all drops are equal, and with NaN.

    Args:
        attributions: (..., E), sums of the class's map over the elements.
        drops: (..., E).

    Source: FunnyBirds, single deletion, 1/2 + ρ/2.
    """
    return (1 + rank_correlation(attributions, drops)) / 2


def names_most_important(attributions: Tensor, drops: Tensor) -> Tensor:
    """Correctness: 1 if the largest attribution is on the object with the largest drop, else 0: (...).

    1/k if it is among k objects with the largest attribution. Chance is 1/E. NaN where the most important
    object is not known: fewer than two objects, no removal lowers the logit, two drops are the largest, or a
    NaN among the values. Arguments as in `removal_correlation`, of objects alone. Not in the paper.
    """
    largest, first = (values == values.amax(-1, keepdim=True) for values in (drops, attributions))
    found = (largest & first).sum(-1).double() / first.sum(-1)
    known = (drops.amax(-1) > 0) & (largest.sum(-1) == 1) & ~attributions.isnan().any(-1)
    return torch.where(known, found, torch.nan) if drops.shape[-1] > 1 else torch.full_like(found, torch.nan)


def important(attributions: Tensor, energy: Tensor) -> Tensor:
    """True for the elements that an explanation calls important, per threshold: (C, T, E) of bool.

    An element is important if its attribution is above the threshold's share of the map's energy.

    Args:
        attributions: (C, E).
        energy: (C,), sum of the positive part of each map. FunnyBirds takes the sum of the map, which may be
            negative for a signed map, and would then make nearly every element important.
    """
    bounds = energy[:, None] * torch.tensor(IMPORTANCE_THRESHOLDS).to(energy)
    return attributions[:, None, :] > bounds[..., None]


def data_check(important: Tensor, own: Tensor) -> Tensor:
    """Completeness: 1 where an object of the class is among the important ones, else 0: (C, T).

    One object is enough to show its class, so the minimal sufficient sets of FunnyBirds' controlled synthetic
    data check are the single objects of the class.

    Args:
        important: (C, T, E) of bool, see `important`.
        own: (C, E) of bool, the objects of each class.
    """
    return (important & own[:, None]).any(-1).double()


def distractibility(important: Tensor, drops: Tensor, evidence: Tensor) -> Tensor:
    """Completeness: share of the irrelevant elements that are not important: (C, T) in [0, 1]; large is good.

    An element is irrelevant if its removal raises the logit, or changes it by less than 5 % of `evidence`.
    NaN without an irrelevant element, or where the evidence is not positive.

    Args:
        important: (C, T, E) of bool, see `important`.
        drops: (C, E).
        evidence: (C,), logit of the class - logit without any object. FunnyBirds takes the logit itself,
            which depends on the constant that a B-cos network adds to its logits.
    """
    irrelevant = ((drops < 0) | (drops.abs() < IRRELEVANT * evidence[:, None])) & (evidence > 0)[:, None]
    wrong = (important & irrelevant[:, None]).sum(-1)
    return 1 - wrong / irrelevant.sum(-1, keepdim=True).double()  # 0 / 0 is NaN


def target_sensitivity(attributions: Tensor, drops: Tensor) -> Tensor:
    """Contrastivity: does a class's map give its own objects more than the maps of other classes do?

    Returns (C,) in [0, 1], for class c the share of the other classes d whose map has a smaller sum on the
    objects of c than the map of c has. Chance is 0.5. Only classes d count for which the network makes this
    distinction: the logit of c drops more without the objects of c than without those of d, and vice versa.
    NaN without such a class. A map that is the same for all classes scores 0: equal sums do not count.

    FunnyBirds compares the maps of two classes that are both wrong, and share different parts with the bird.

    Args:
        attributions: (C, C), at (c, d) the sum of the map of c over the objects of d.
        drops: (C, C), at (c, d) the drop of the logit of c without all objects of d.
    """
    larger = drops.diagonal()[:, None] > drops
    valid = larger & larger.T
    right = attributions.diagonal()[:, None] > attributions.T
    return (right & valid).sum(1) / valid.sum(1).double()
