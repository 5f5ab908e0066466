"""How images are prepared for the weights of a network: what timm, torchvision and open_clip say about their weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torchvision

from pipelines.bcos import IMAGENET_MEAN, IMAGENET_STD
from pipelines.models.clip import preprocess_config, tags_of
from pipelines.models.errors import WeightsError
from pipelines.models.weights import names_a_file
from pipelines.models.zoo import library_of
from pipelines.storage.errors import one_line
from pipelines.storage.files import read_json

log = logging.getLogger(__name__)

CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of OpenAI's CLIP


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Normalisation and evaluation view that weights were trained for; `None` is what their publisher does not say.

    Attributes:
        mean, std: of RGB in [0, 1].
        normalisation_known: whether the publisher says `mean` and `std`; otherwise they are ImageNet's, or for a tower of
            open_clip those of OpenAI's CLIP.
        image_size: side of the square that the network sees, pixels.
        crop_pct: `image_size` over the shorter side that images are resized to before the centre crop.
        interpolation: of that resizing: `bilinear`, `bicubic`, ...
        options: of the constructor, which the weights need.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    normalisation_known: bool = False
    image_size: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def view(self) -> dict[str, Any]:
        """Image size, crop and interpolation, as far as they are known."""
        known = {
            "image_size": self.image_size,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
        }
        return {key: value for key, value in known.items() if value is not None}

    def __str__(self) -> str:
        crop = None if self.crop_pct is None else f"crop {self.crop_pct:.3g}"
        size = None if self.image_size is None else f"{self.image_size} px"
        told = [f"mean {_few(self.mean)}, std {_few(self.std)}", size, crop, self.interpolation]
        return ", ".join(each for each in told if each is not None)


def preprocessing_of(name: str, weights: str, options: dict[str, Any] | None = None) -> Preprocessing:
    """What is known about the preprocessing for `weights` of the network `name`; arguments are those of `build`.

    A file says something if timm's `config.json` lies beside it, as on the Hugging Face Hub.

    Raises:
        ModelError, WeightsError: an unknown name; an unknown tag.
    """
    library, plain = library_of(name)
    if library == "open_clip":
        return _of_open_clip(plain, weights, options or {})
    if weights == "none":
        return Preprocessing()
    if names_a_file(weights):
        return _beside(weights)
    try:
        if library == "torchvision":
            return _of_torchvision(plain, weights)
        if library == "timm":
            return _of_timm(plain if weights == "pretrained" else f"{plain}.{weights}", options or {})
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"weights {weights!r} of {name}: no such tag ({one_line(error)}), and no file here"
        ) from None
    raise WeightsError(
        f"weights {weights!r} of {name}: this network has no tagged weights: give a file or URL"
    )


def chosen_preprocessing(
    name: str,
    weights: str,
    options: dict[str, Any] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    eval_resize: int | None = None,
    section: str = "model",
) -> Preprocessing:
    """The preprocessing for `weights`, with `mean` and `std` where they are given, the default where nobody says any.

    The log says in one line what was taken, and in another one what contradicts the weights.

    Args:
        name, weights, options: as in `build`.
        mean, std: params of the user; `None`: the weights' own.
        image_size: side of the images here, pixels.
        eval_resize: shorter side before the centre crop here, pixels; `None`: the whole image is resized to the square.
        section: of the params, for the log.
    """
    known = preprocessing_of(name, weights, options)
    given = {key: tuple(value) for key, value in (("mean", mean), ("std", std)) if value is not None}
    other = {key: value for key, value in given.items() if not _close(value, getattr(known, key))}
    if known.normalisation_known and other:
        told = ", ".join(f"{section}.{key} {_few(value)}" for key, value in other.items())
        log.warning(
            "%s contradicts the weights %s of %s (%s): the params are taken", told, weights, name, known
        )
    elif known.normalisation_known:
        log.info("weights %s of %s: %s, as published with them", weights, name, known)
    elif weights != "none" and len(given) < 2:
        default = "ImageNet's" if _close(known.mean, IMAGENET_MEAN) else "that of OpenAI's CLIP"
        told = "weights %s of %s do not say their normalisation: %s is taken%s"
        log.info(told, weights, name, default, _of_library(name, known))
    if image_size is not None and known.view and weights != "none":
        here = Preprocessing(
            image_size=image_size, crop_pct=image_size / (eval_resize or image_size), interpolation="bilinear"
        )
        differing = {
            key: value for key, value in here.view.items() if not _same(known.view.get(key, value), value)
        }
        if differing:
            told = ", ".join(f"{key} {known.view[key]} (here {value})" for key, value in differing.items())
            log.info("weights %s of %s were evaluated otherwise than here: %s", weights, name, told)
    return dataclasses.replace(known, **given)  # type: ignore[arg-type]


def _of_torchvision(name: str, tag: str) -> Preprocessing:
    kinds = torchvision.models.get_model_weights(name)
    weights = kinds[tag.replace(f"{kinds.__name__}.", "")]
    view = weights.transforms()
    options: dict[str, Any] = {}
    if name in (
        "googlenet",
        "inception_v3",
    ):  # their pretrained weights want another normalisation, which the network makes itself
        options = {"transform_input": True} | ({"aux_logits": False} if name == "googlenet" else {})
    elif name.startswith("vit_"):
        options = {"image_size": weights.meta["min_size"][0]}
    size = int(view.crop_size[0])
    crop = size / view.resize_size[0]
    return Preprocessing(
        tuple(view.mean), tuple(view.std), True, size, crop, str(view.interpolation.value), options
    )


def _of_timm(name: str, options: dict[str, Any]) -> Preprocessing:
    chosen = {key: options[key] for key in ("pretrained_cfg", "pretrained_cfg_overlay") if options.get(key)}
    return _of_config(timm.models.resolve_pretrained_cfg(name, **chosen).to_dict())


def _of_open_clip(plain: str, weights: str, options: dict[str, Any]) -> Preprocessing:
    """What open_clip says about the weights; the size is that of the tower."""
    config = preprocess_config(plain, weights, options)
    crop = (
        1.0 if config.get("resize_mode") == "shortest" else None
    )  # otherwise the whole image is squeezed to the square
    view: dict[str, Any] = {
        "image_size": config["image_size"],
        "crop_pct": crop,
        "interpolation": config.get("interpolation"),
    }
    if not config.get("mean") or not config.get("std"):
        return Preprocessing(CLIP_MEAN, CLIP_STD, **view)
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), True, **view)


def _of_config(config: dict[str, Any]) -> Preprocessing:
    """What timm's `pretrained_cfg` says."""
    view: dict[str, Any] = {"crop_pct": config.get("crop_pct"), "interpolation": config.get("interpolation")}
    size = config["input_size"][-1] if config.get("input_size") else None
    if not config.get("mean") or not config.get("std"):
        return Preprocessing(image_size=size, **view)
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), True, size, **view)


def _beside(weights: str) -> Preprocessing:
    """What the `config.json` beside a local file says."""
    if "://" in weights:
        return Preprocessing()
    try:
        config = read_json(Path(weights).expanduser().parent / "config.json")
        return _of_config(config["pretrained_cfg"])
    except (OSError, TypeError, KeyError, ValueError):  # none, or one of other software
        return Preprocessing()


def _of_library(name: str, default: Preprocessing) -> str:
    """What the library's own weights of the network want, if that is not the normalisation of `default`, for the log."""
    library, plain = library_of(name)
    known = default
    if library == "timm":
        known = _of_timm(plain, {})
    elif library == "open_clip" and (tags := tags_of(plain)):
        known = _of_open_clip(plain, tags[0], {})
    if _close(known.mean, default.mean):
        return ""
    return f" ({library}'s own want mean {_few(known.mean)}, std {_few(known.std)}: set mean and std if these are such weights)"


def _same(one: Any, other: Any) -> bool:
    return one == other if isinstance(one, str) else abs(one - other) < 1e-2


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-3 for a, b in zip(one, other, strict=True))


def _few(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
