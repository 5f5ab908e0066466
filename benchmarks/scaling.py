"""Scaling on paper: what ImageNet and CC3M ask of 8 and 64 GPUs, from figures that were measured; the tables of docs/scaling.md.

    python -m benchmarks.scaling [--gpu 1] [--link 25] [--cores 8]

Needs nothing but Python. What was measured, and how, stands in docs/scaling.md; the arguments are what was not: how fast a GPU is
beside the one that was measured, gigabytes a second between nodes, and cores beside each GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import product

from benchmarks.markdown import table


@dataclass(frozen=True)
class Data:
    """A data set: images, bytes of one in its shard, and of what the teacher's stored explanation takes of the disk."""

    name: str
    images: int
    bytes_each: int


@dataclass(frozen=True)
class Method:
    """A way of training: images a second of one H200, the effective batch and the epochs as published."""

    name: str
    rate: float
    batch: int
    epochs: int
    trained: float  # bytes of the parameters that are trained: their gradients are exchanged


DATA = (Data("ImageNet", 1_281_167, 108_083), Data("CC3M", 2_900_000, 45_585))
GPUS = (8, 64)
SHARDED = 489  # images a second and core
DECODED = 515  # images a second and core: read, decoded, cropped to 224 px, flipped
EXPLANATION = 6 * 224 * 224 * 2  # bytes of a stored W(x), one cell a pixel, float16
SHARD = 1000  # images
RESNET50, RESNET18 = 25.6e6 * 4, 11.7e6 * 4
BCOS, KD = 64 / 36.7e-3, 128 / 20.4e-3  # compiled steps, bfloat16, no optimiser: docs/benchmarks.md
METHODS = (
    Method("B-cosification, ResNet-50", BCOS, 256, 90, RESNET50),
    Method("plain distillation, ResNet-34 to 18", KD, 256, 200, RESNET18),
    Method("e²KD, live", KD / 1.721, 256, 200, RESNET18),
    Method("e²KD, frozen", KD / 1.198, 256, 200, RESNET18),
    Method("e²KD, every 16th step", KD * 16 / (15 + 1.721), 256, 200, RESNET18),
    Method("guidance at the input, ResNet-50", BCOS / 1.301, 64, 10, RESNET50),
)


def exchange(parameters: float, gpus: int, link: float) -> float:
    """Seconds in which a ring of GPUs adds up gradients; 300 GB/s within a node of 8, `link` GB/s where there are more."""
    return 2 * (gpus - 1) / gpus * parameters / (300e9 if gpus <= 8 else link * 1e9)


def sizes() -> str:
    """What the data takes."""
    heads = ["data", "images", "bytes an image", "shards", "of 1000 images"]
    heads += ["stored maps, a cell a pixel", "4 × 4 pixels", "sharding, one core"]
    rows = []
    for data in DATA:
        in_all, maps = data.images * data.bytes_each / 1e9, data.images * EXPLANATION / 1e9
        shards = f"{-(-data.images // SHARD)} × {SHARD * data.bytes_each / 1e6:.0f} MB"
        row = [data.name, f"{data.images:,}", f"{data.bytes_each / 1000:.0f} kB", f"{in_all:.0f} GB", shards]
        rows.append([*row, f"{maps:.0f} GB", f"{maps / 16:.0f} GB", f"{data.images / SHARDED / 60:.0f} min"])
    return table(heads, rows)


def rates(rate: float) -> str:
    """What GPUs, each of which B-cosifies `rate` images a second, ask of storage and cores."""
    heads = (
        "GPUs",
        "data",
        "images a second",
        "from the storage, once",
        "decoding cores a GPU",
        "shards a rank",
        "an epoch",
    )
    rows = []
    for gpus, data in product(GPUS, DATA):
        images = gpus * rate
        needs = [f"{images * data.bytes_each / 1e9:.2f} GB/s", f"{rate / DECODED:.1f}"]
        epoch = [f"{data.images / SHARD / gpus:.0f}", f"{data.images / images / 60:.1f} min"]
        rows.append([gpus, data.name, f"{images:,.0f}", *needs, *epoch])
    return table(heads, rows)


def limits(gpu: float, link: float, cores: int) -> str:
    """What a step of each method waits for, and how long all epochs of ImageNet take; GPUs are `gpu` times as fast as an H200."""
    heads = ["method, published batch and epochs", "GPUs", "images a GPU and step"]
    heads += ["computing, ms", "gradients, ms", "decoding, ms", "the limit", "ImageNet, all epochs"]
    rows = []
    for method, gpus in product(METHODS, GPUS):
        share = method.batch / gpus
        seconds = {
            "computing": share / (method.rate * gpu),
            "gradients": exchange(method.trained, gpus, link),
            "decoding": share / (cores * DECODED),
        }
        hours = DATA[0].images / method.batch * method.epochs * max(seconds.values()) / 3600
        parts = [f"{1000 * value:.1f}" for value in seconds.values()]
        rows.append(
            [method.name, gpus, f"{share:g}", *parts, max(seconds, key=seconds.__getitem__), f"{hours:.1f} h"]
        )
    return table(heads, rows)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", type=float, default=1, help="how many times as fast as an H200 a GPU is")
    parser.add_argument("--link", type=float, default=25, help="gigabytes a second between nodes")
    parser.add_argument("--cores", type=int, default=8, help="beside each GPU")
    options = parser.parse_args()
    print(sizes(), rates(BCOS * options.gpu), limits(options.gpu, options.link, options.cores), sep="\n\n")


if __name__ == "__main__":
    main()
