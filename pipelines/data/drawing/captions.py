"""Captions for images of `scenes`: each names every shape, some also the colours or the background."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.random import Generator

SURFACES = {  # background -> its name in a sentence
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
SENTENCES = ("{}", "a picture of {}", "a drawing of {}", "there is {}", "one can see {}")
PLACES = ("{} on {}", "{} in front of {}", "{} and {} behind")


def sentences(
    objects: Sequence[tuple[str, str]], background: str, rng: Generator, detail: float = 0.5
) -> tuple[str, ...]:
    """One to three different sentences about an image, such as "a red circle on a striped background".

    Each sentence names every shape. People leave things out, so only a share of the sentences name colours,
    or the background. The lower this share, the more often the shape has to tell the images apart.

    Args:
        objects: (colour, shape) of each object.
        background: a key of `SURFACES`.
        rng: draws the number and choice of sentences, what each one names, and the order of its objects.
        detail: probability in [0, 1] that a sentence names the colours, and that it names the background.
    """
    found = []
    for number in rng.permutation(len(SENTENCES))[: int(rng.integers(1, 4))]:
        coloured, placed = rng.random(2) < detail
        order = [objects[place] for place in rng.permutation(len(objects))]
        named = listed([f"{colour} {shape}" if coloured else shape for colour, shape in order])
        if placed:
            named = PLACES[int(rng.integers(len(PLACES)))].format(named, SURFACES[background])
        found.append(SENTENCES[number].format(named))
    return tuple(found)


def listed(nouns: Sequence[str]) -> str:
    """The nouns with their articles, such as "a red circle and an orange star"."""
    return " and ".join(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in nouns)
