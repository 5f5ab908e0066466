"""The overrides of a search's trial compose the params of the trial."""

import pytest
from omegaconf import OmegaConf

from stages.tools.search_apply import changes, composition


def composed(*overrides):
    return OmegaConf.create(OmegaConf.to_container(composition(overrides), resolve=True))


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe=default"],
        ["recipe=smoke", "bcosify.pretrained.optim.lr=0.1", "search.asha=null"],  # replaces several values
        ["recipe=cifar10", "model=resnet18", "guide=voc2007"],
        ["recipe=default", "model=cifar_resnet20"],  # lacks an option that the recipe has
        # Replaces an interpolation.
        ["recipe=default", "distill.student.options={patch_size: 8, depth: 4}"],
        ["recipe=default", "dataset=imagefolder", "datasets.imagefolder.root='My Images'"],
    ],
    ids=str,
)
def test_params_come_back(overrides):
    params = composed(*overrides)
    assert composed(*changes(params)) == params


def test_what_the_recipe_takes_from_elsewhere_follows_only_where_it_did():
    params = composed("recipe=default", "distill.kd.optim.lr=0.5")
    assert changes(params) == ["recipe=default", "distill.kd.optim.lr=0.5"]
    OmegaConf.update(params, "distill.e2kd.optim.lr", 0.005)
    assert changes(params) == ["recipe=default", "distill.kd.optim.lr=0.5", "distill.e2kd.optim.lr=0.005"]
