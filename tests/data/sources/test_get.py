"""`get` imports the module of the requested data set, and no code of other data sets."""

import json
import subprocess
import sys

from pipelines.data.sources import get, modules
from pipelines.params import Cc3mParams, ImageFolderParams, MixtureParams, ScenesParams

OWN = {  # modules that belong to one data set -> that data set
    "formats.coco_json": "coco2014",
    "formats.coco_masks": "coco2014",
    "formats.voc_xml": "voc2007",
    "formats.voc_masks": "voc2007",
    "formats.cub": "waterbirds",
    "drawing.scene": "scenes",
    "drawing.shapes": "scenes",
    "drawing.backgrounds": "scenes",
    "drawing.captions": "scenes",
    "formats.caption_tables": "captions",
    "formats.img2dataset": "cc3m",
    **{
        f"sources.{name}": name
        for name in ("captions", "cc3m", "cifar10", "coco2014", "imagefolder", "imagenet")
    },
    **{f"sources.{name}": name for name in ("mixture", "scenes", "voc2007", "waterbirds")},
}
IMPORTED = (
    """
import json, sys
from types import SimpleNamespace
from pipelines.data import sources

found = {}
for name in json.loads(sys.argv[1]):
    for module in [module for module in sys.modules """
    """if module.startswith("pipelines.data.") and module != sources.__name__]:
        del sys.modules[module]
    sources.get(SimpleNamespace(source=name))
    found[name] = sorted(module for module in sys.modules if module.startswith("pipelines.data."))
print(json.dumps(found))
"""
)


def test_getting_one_data_set_imports_no_code_of_another() -> None:
    names = sorted(set(OWN.values()))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, json.dumps(names)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    for name, imported in found.items():
        own = {OWN.get(module.removeprefix("pipelines.data."), name) for module in imported}
        assert own == {name}
        assert f"pipelines.data.sources.{name}" in imported


def test_the_code_of_a_mixture_is_that_of_its_parts_too() -> None:
    folder = ImageFolderParams(source="imagefolder", root="photos")
    assert modules(folder) == ("pipelines.data.sources.imagefolder",)
    mixture = MixtureParams(source="mixture", of=(folder, Cc3mParams(source="cc3m", root="tars"), folder))
    assert modules(mixture) == tuple(
        f"pipelines.data.sources.{name}" for name in ("mixture", "imagefolder", "cc3m")
    )


def test_the_source_of_params_is_the_one_that_they_name() -> None:
    for params in (
        ScenesParams(source="scenes", counts={"train": 1, "val": 1, "test": 1}),
        ImageFolderParams(source="imagefolder", root="photos"),
    ):
        source = get(params)
        assert source.params is params
        assert type(source).__module__ == f"pipelines.data.sources.{params.source}"
