"""Sentences about an image of `scenes`: each names every object, its colour, and the background."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.random import Generator

SURFACES = {  # background -> how a sentence calls it
    "bricks": "a brick background",
    "checks": "a checked background",
    "chevrons": "a chevron background",
    "clouds": "a cloudy background",
    "dots": "a dotted background",
    "gradient": "a gradient background",
    "plaid": "a plaid background",
    "ripples": "a rippled background",
    "stripes": "a striped background",
    "waves": "a wavy background",
}
SENTENCES = (
    "{objects} on {surface}",
    "{objects} in front of {surface}",
    "{surface} with {objects}",
    "a picture of {objects} on {surface}",
    "there is {objects} on {surface}",
)


def sentences(nouns: Sequence[str], background: str, rng: Generator) -> tuple[str, ...]:
    """One to three different sentences about an image, such as "a red circle on a striped background".

    Args:
        nouns: colour and shape of each object, such as "red circle".
        background: a key of `SURFACES`.
        rng: draws how many sentences there are, which ones, and the order of the objects in each.
    """
    templates = rng.permutation(len(SENTENCES))[: int(rng.integers(1, 4))]
    return tuple(
        SENTENCES[number].format(
            objects=listed([nouns[place] for place in rng.permutation(len(nouns))]), surface=SURFACES[background]
        )
        for number in templates
    )


def listed(nouns: Sequence[str]) -> str:
    """Nouns with their articles: "a red circle and an orange star"."""
    return " and ".join(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in nouns)
