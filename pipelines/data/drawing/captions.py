"""Sentences about an image of `scenes`: each names every object, some its colour or the background."""

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
SENTENCES = ("{}", "a picture of {}", "a drawing of {}", "there is {}", "one can see {}")
PLACES = ("{} on {}", "{} in front of {}", "{} and {} behind")
SHARE = 0.5  # of the sentences that name colours, and of those that name the background


def sentences(objects: Sequence[tuple[str, str]], background: str, rng: Generator) -> tuple[str, ...]:
    """One to three different sentences about an image, such as "a red circle on a striped background" or "there is a circle".

    Each sentence names every shape. People leave things out, so half of the sentences name no colours, and half no background:
    what tells images apart is then the shape more often.

    Args:
        objects: colour and shape of each object.
        background: a key of `SURFACES`.
        rng: draws how many sentences there are, which ones, what they name, and the order of the objects in each.
    """
    found = []
    for number in rng.permutation(len(SENTENCES))[: int(rng.integers(1, 4))]:
        coloured, placed = rng.random(2) < SHARE
        order = [objects[place] for place in rng.permutation(len(objects))]
        named = listed([f"{colour} {shape}" if coloured else shape for colour, shape in order])
        if placed:
            named = PLACES[int(rng.integers(len(PLACES)))].format(named, SURFACES[background])
        found.append(SENTENCES[number].format(named))
    return tuple(found)


def listed(nouns: Sequence[str]) -> str:
    """Nouns with their articles: "a red circle and an orange star"."""
    return " and ".join(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in nouns)
