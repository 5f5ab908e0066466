"""The GPU computes what the CPU computes. Needs a GPU, and neither ray, mlflow nor dvc."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.backends import cudnn

from benchmarks.step import keep_small_features
from pipelines import models
from pipelines.bcos import add_inverse, bcosify, dynamic_weights
from pipelines.bcos.fused import set_up_compiler
from pipelines.data.loading.loader import loader
from pipelines.evaluation import evaluate, figures
from pipelines.methods import build_bcosification, build_e2kd, build_guidance
from pipelines.models import build
from pipelines.params import (
    BcosificationParams,
    DataParams,
    DistillationParams,
    EvaluateParams,
    GuidanceParams,
    StudentParams,
    TrainingParams,
)
from pipelines.training import Context, Job, TrainingError, train
from tests.support.drawn import drawn_shards, flat, known_by_heart
from tests.support.method_params import method_params
from tests.support.toy import CLASSES, accident, identical, toy_job, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
DATA = DataParams(image_size=32, augment="none")
NETWORKS = ["resnet8", "densenet121", "timm:convnext_atto", "timm:vit_tiny_patch16_224"]


@pytest.fixture(autouse=True)
def _exact():
    """Float32 without TF32, and deterministic algorithms."""
    with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
    torch.compiler.reset()


def network(name):
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2} if "vit" in name else {}
    return keep_small_features(bcosify(build(name, num_classes=CLASSES, options=options)))


def batch(count=8, size=32, dtype=torch.float64):
    torch.manual_seed(1)
    return add_inverse(torch.rand(count, 3, size, size, dtype=dtype)), torch.arange(count) % CLASSES


def loss(model, images, targets):
    """A scalar loss on W(x) and on the logits, each divided by its norm."""
    logits, found = dynamic_weights(model, images, targets, create_graph=True)
    return (found / found.detach().norm()).pow(3).sum() + (logits / logits.detach().norm()).pow(3).sum()


def gradients(function, model, images, targets):
    """Gradients of all parameters as one vector on the CPU."""
    found = torch.autograd.grad(function(model, images, targets), list(model.parameters()))
    return torch.cat([each.detach().flatten().cpu() for each in found])


def difference(one, other):
    """Relative difference ‖one − other‖ / ‖other‖, on the CPU in double precision."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_weights_and_gradients_are_those_of_the_cpu(name, layout):
    on_cpu = network(name).double().eval()
    on_gpu = copy.deepcopy(on_cpu).to("cuda", memory_format=layout)
    images, targets = batch()
    there = (images.to("cuda", memory_format=layout), targets.cuda())
    for one, other in zip(
        dynamic_weights(on_gpu, *there), dynamic_weights(on_cpu, images, targets), strict=True
    ):
        assert difference(one, other) < 1e-9
    on_cpu.train()
    on_gpu.train()
    assert difference(gradients(loss, on_gpu, *there), gradients(loss, on_cpu, images, targets)) < 1e-6


@pytest.mark.parametrize("name", ["resnet8", "timm:vit_tiny_patch16_224"])
def test_compiled_it_has_the_gradient_of_double_precision(name):
    set_up_compiler()
    double = network(name).double().train()
    single = copy.deepcopy(double).float().to("cuda", memory_format=torch.channels_last)
    images, targets = batch()
    found = gradients(torch.compile(loss, fullgraph=True), single, images.float().cuda(), targets.cuda())
    assert difference(found, gradients(loss, double, images, targets)) < 1e-3


@pytest.mark.parametrize("name", ["resnet8", "timm:vit_tiny_patch16_224"])
def test_under_autocast_it_is_near_double_precision(name):
    model = network(name).double().eval()
    images, targets = batch()
    exact = dynamic_weights(model, images, targets)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = dynamic_weights(model.float().cuda(), images.float().cuda(), targets.cuda())
    assert all(difference(one, other) < 0.1 for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("at_step", [3, 7])
def test_killed_and_run_again_is_as_never_killed(tmp_path, at_step):
    """Trains with dropout, which draws from the GPU's own generator."""
    settings = {"gpus_per_worker": 1, "precision": "bfloat16"}
    whole = train(toy_job(tmp_path / "whole", **settings))
    broken = accident("raise", at_step, tmp_path / "marker")
    with pytest.raises(ConnectionError):
        train(toy_job(tmp_path / "broken", broken, **settings))
    assert identical(weights(whole), weights(train(toy_job(tmp_path / "broken", **settings))))


def test_a_loss_that_is_not_finite_is_found_at_the_next_look(tmp_path):
    with pytest.raises(
        TrainingError, match=r"the loss of step 4 .* not a finite number; the checkpoint of step 2 is kept"
    ):
        train(toy_job(tmp_path, accident("nan", 4), gpus_per_worker=1, log_every=3))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return drawn_shards(
        tmp_path_factory.mktemp("objects"), 20, image_size=32, counts={"train": 40, "val": 10, "test": 50}
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_the_gpu_are_those_of_the_cpu(shards, workers):
    data, cuda = DATA.model_copy(update={"loader_workers": workers}), Context(device=torch.device("cuda"))
    for here, there in zip(
        loader(shards, "test", data, 7), loader(shards, "test", data, 7, context=cuda), strict=True
    ):
        assert here["key"] == there["key"]
        assert there["image"].is_cuda
        assert there["image"].max() <= 1
        torch.testing.assert_close(there["image"].cpu(), here["image"], rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def directories(tmp_path_factory, shards):
    return known_by_heart(tmp_path_factory.mktemp("models"), shards, DATA, "cuda")


def job(shards, directories, name, directory, training):
    """A job that trains one epoch of the method `name`, on the B-cos model or the conventional one."""
    settings = {"epochs": 1, "batch_size": 8, "lr": 0.01, "optimiser": "sgd"}
    if name == "bcosification":
        optim = method_params(BcosificationParams, **settings)
        spec = replace(models.read_spec(directories["conventional"]), kind="bcos", design=optim.design())
        method = partial(build_bcosification, spec, directories["conventional"], optim, 0)
    elif name == "guidance":
        optim = method_params(GuidanceParams, **settings, localisation_weight=0.01)
        method = partial(build_guidance, directories["bcos"], optim)
    else:
        optim = method_params(DistillationParams, **settings, explanation_weight=1.0)
        student = StudentParams(name="resnet8")
        method = partial(
            build_e2kd, student, models.read_spec(directories["bcos"]), directories["bcos"], optim, 0
        )
    return Job(
        build=method,
        shards=shards,
        data=DATA,
        params=optim,
        training=training,
        seed=0,
        directory=str(directory),
    )


@pytest.mark.parametrize("name", ["bcosification", "distillation", "guidance"])
def test_an_epoch_of_a_method_is_that_of_the_cpu(shards, directories, tmp_path, name):
    histories = {}
    for gpus in (0, 1):
        training = TrainingParams(workers=0, gpus_per_worker=gpus)
        histories[gpus] = train(job(shards, directories, name, tmp_path / str(gpus), training)).history[0][
            "metrics"
        ]
    rate = "train/images_per_second"
    assert {**histories[1], rate: 0} == pytest.approx({**histories[0], rate: 0}, rel=0.01, abs=0.01)


@pytest.mark.parametrize("name", ["bcosification", "distillation", "guidance"])
def test_compiled_and_in_half_precision_an_epoch_of_a_method_is_near_that_in_single(
    shards, directories, tmp_path, name
):
    losses = {}
    for kind, changes in {"plain": {}, "fast": {"compile": True, "precision": "bfloat16"}}.items():
        training = TrainingParams(workers=0, gpus_per_worker=1, **changes)
        losses[kind] = train(job(shards, directories, name, tmp_path / kind, training)).history[0]["metrics"][
            "train/loss"
        ]
    assert losses["fast"] == pytest.approx(losses["plain"], rel=0.05)


def test_an_evaluation_finds_what_it_finds_on_the_cpu(shards, directories):
    params = EvaluateParams(batch_size=7, grid_size=2, grid_count=6, grid_batch=4, smooth=3)
    arguments = (directories, shards, DATA, params, "test", "conventional")
    # TF32 is torch's default; evaluation turns it off by itself
    with cudnn.flags(enabled=True, deterministic=True, allow_tf32=True):
        here, there = (
            figures(evaluate(Context(device=torch.device(name)), *arguments)) for name in ("cpu", "cuda")
        )
    assert there["grids"]["count"] == 6
    assert there["models"]["bcos"]["explanations"]["bcos"]["unexplained_share"] < 1e-4
    assert dict(flat(there)) == pytest.approx(dict(flat(here)), abs=1e-3)
