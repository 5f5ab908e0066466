"""Estimates what training on ImageNet and CC3M needs on 8 and 64 GPUs: the tables of docs/scaling.md.

    python -m benchmarks.scaling [--gpu 1] [--link 25] [--cores 8]

The estimates extrapolate figures that were measured on one machine; docs/scaling.md says how. The arguments
are the assumptions: the speed of a GPU relative to the measured H200, GB/s between nodes, and CPU cores per
GPU. Needs only Python.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import product

from benchmarks.markdown import table


@dataclass(frozen=True)
class Data:
    """A data set, with its number of images and the mean bytes of an image in its shard."""

    name: str
    images: int
    bytes_each: int


@dataclass(frozen=True)
class Method:
    """A training method, with the batch size and epochs of its paper."""

    name: str
    rate: float  # images per second on one H200
    batch: int
    epochs: int
    trained: float  # bytes of the trained parameters, whose gradients the GPUs exchange


DATA = (Data("ImageNet", 1_281_167, 108_083), Data("CC3M", 2_900_000, 45_585))
GPUS = (8, 64)
SHARDED = 489  # images per second and core that the stage `shard` writes
DECODED = 515  # images per second and core that are read, decoded, cropped to 224 px and flipped
EXPLANATION = 6 * 224 * 224 * 2  # bytes of a stored W(x) of 224 x 224 pixels in float16
SHARD = 1000  # images per shard
RESNET50, RESNET18 = 25.6e6 * 4, 11.7e6 * 4  # bytes of the parameters in float32
# images per second, compiled, bfloat16, without optimiser step (docs/benchmarks.md)
BCOS, KD = 64 / 36.7e-3, 128 / 20.4e-3
METHODS = (
    Method("B-cosification, ResNet-50", BCOS, 256, 90, RESNET50),
    Method("plain distillation, ResNet-34 to 18", KD, 256, 200, RESNET18),
    Method("e²KD, live", KD / 1.721, 256, 200, RESNET18),
    Method("e²KD, frozen", KD / 1.198, 256, 200, RESNET18),
    Method("e²KD, every 16th step", KD * 16 / (15 + 1.721), 256, 200, RESNET18),
    Method("guidance at the input, ResNet-50", BCOS / 1.301, 64, 10, RESNET50),
)


def exchange(parameters: float, gpus: int, link: float) -> float:
    """Seconds of a ring all-reduce of gradients: 300 GB/s within a node of 8 GPUs, else `link` GB/s."""
    return 2 * (gpus - 1) / gpus * parameters / (300e9 if gpus <= 8 else link * 1e9)


def sizes() -> str:
    """Table of the data's size on disk: images, shards and stored explanations."""
    heads = ["data", "images", "bytes per image", "shards", "shards of 1000 images"]
    heads += ["stored maps, per pixel", "per 4 × 4 pixels", "sharding, one core"]
    rows = []
    for data in DATA:
        in_all, maps = data.images * data.bytes_each / 1e9, data.images * EXPLANATION / 1e9
        shards = f"{-(-data.images // SHARD)} × {SHARD * data.bytes_each / 1e6:.0f} MB"
        row = [data.name, f"{data.images:,}", f"{data.bytes_each / 1000:.0f} kB", f"{in_all:.0f} GB", shards]
        rows.append([*row, f"{maps:.0f} GB", f"{maps / 16:.0f} GB", f"{data.images / SHARDED / 60:.0f} min"])
    return table(heads, rows)


def rates(rate: float) -> str:
    """Table of the bandwidth and CPU cores that GPUs need if each B-cosifies `rate` images per second."""
    heads = (
        "GPUs",
        "data",
        "images per second",
        "reading from the storage",
        "decoding cores per GPU",
        "shards per rank",
        "time of an epoch",
    )
    rows = []
    for gpus, data in product(GPUS, DATA):
        images = gpus * rate
        needs = [f"{images * data.bytes_each / 1e9:.2f} GB/s", f"{rate / DECODED:.1f}"]
        epoch = [f"{data.images / SHARD / gpus:.0f}", f"{data.images / images / 60:.1f} min"]
        rows.append([gpus, data.name, f"{images:,.0f}", *needs, *epoch])
    return table(heads, rows)


def limits(gpu: float, link: float, cores: int) -> str:
    """Table of the bottleneck of a step of each method, and of the hours for all epochs on ImageNet.

    GPUs are `gpu` times as fast as an H200, nodes are connected with `link` GB/s, and each GPU has `cores`
    CPU cores.
    """
    heads = ["method, published batch and epochs", "GPUs", "images per GPU and step"]
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
    parser.add_argument("--gpu", type=float, default=1, help="speed of a GPU relative to an H200")
    parser.add_argument("--link", type=float, default=25, help="gigabytes per second between nodes")
    parser.add_argument("--cores", type=int, default=8, help="CPU cores per GPU")
    options = parser.parse_args()
    print(sizes(), rates(BCOS * options.gpu), limits(options.gpu, options.link, options.cores), sep="\n\n")


if __name__ == "__main__":
    main()
