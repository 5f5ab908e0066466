"""How images must be prepared for given weights, as timm, torchvision and open_clip publish it."""

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

# of OpenAI's CLIP
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Normalisation and evaluation view of published weights; `None` if their publisher does not say.

    Attributes:
        mean, std: of RGB in [0, 1].
        normalisation_known: True if the publisher gives `mean` and `std`. Otherwise they are ImageNet's or,
            for a tower of open_clip, OpenAI's CLIP's.
        image_size: side of the square input, pixels.
        crop_pct: `image_size` / shorter side of the image before the centre crop.
        interpolation: of the resizing before the crop: `bilinear`, `bicubic`, ...
        options: arguments of the network's constructor that the weights require.
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
        """`image_size`, `crop_pct` and `interpolation`, without those that are `None`."""
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
    """Returns the published preprocessing for `weights` of the network `name`; arguments as in `build`.

    For a weights file, it is read from timm's `config.json` in the same folder (as on the Hugging Face Hub),
    if any.

    Raises:
        ModelError: the name is unknown.
        WeightsError: the tag is unknown.
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
    """Returns the preprocessing for `weights`, with the user's `mean` and `std` if these are given.

    The log says where the normalisation comes from, warns if the user's contradicts the weights', and says
    how the weights' evaluation view differs from the user's.

    Args:
        name, weights, options: as in `build`.
        mean, std: the user's; `None` takes those of the weights, or the default if their publisher gives
            none.
        image_size: side of the user's square images, pixels.
        eval_resize: shorter side of the user's images before the centre crop, pixels; `None` resizes the
            whole image to the square.
        section: section of `params.yaml` with these values, for the log.
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
    if name in ("googlenet", "inception_v3"):  # the network itself changes the normalisation to its weights'
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
    config = preprocess_config(plain, weights, options)
    # other modes resize the whole image to the square, without a crop
    crop = 1.0 if config.get("resize_mode") == "shortest" else None
    view: dict[str, Any] = {
        "image_size": config["image_size"],
        "crop_pct": crop,
        "interpolation": config.get("interpolation"),
    }
    if not config.get("mean") or not config.get("std"):
        return Preprocessing(CLIP_MEAN, CLIP_STD, **view)
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), True, **view)


def _of_config(config: dict[str, Any]) -> Preprocessing:
    """The preprocessing in timm's `pretrained_cfg`."""
    view: dict[str, Any] = {"crop_pct": config.get("crop_pct"), "interpolation": config.get("interpolation")}
    size = config["input_size"][-1] if config.get("input_size") else None
    if not config.get("mean") or not config.get("std"):
        return Preprocessing(image_size=size, **view)
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), True, size, **view)


def _beside(weights: str) -> Preprocessing:
    """The preprocessing in the `config.json` beside a local weights file."""
    if "://" in weights:
        return Preprocessing()
    try:
        config = read_json(Path(weights).expanduser().parent / "config.json")
        return _of_config(config["pretrained_cfg"])
    except (OSError, TypeError, KeyError, ValueError):  # no config.json, or one of other software
        return Preprocessing()


def _of_library(name: str, default: Preprocessing) -> str:
    """Hint for the log: the normalisation of the library's own weights, if it differs from `default`'s."""
    library, plain = library_of(name)
    known = default
    if library == "timm":
        known = _of_timm(plain, {})
    elif library == "open_clip" and (tags := tags_of(plain)):
        known = _of_open_clip(plain, tags[0], {})
    if _close(known.mean, default.mean):
        return ""
    return (
        f" ({library}'s own want mean {_few(known.mean)}, std {_few(known.std)}: "
        "set mean and std if these are such weights)"
    )


def _same(one: Any, other: Any) -> bool:
    return one == other if isinstance(one, str) else abs(one - other) < 1e-2


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-3 for a, b in zip(one, other, strict=True))


def _few(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
