"""An image is explained for texts: one forward pass, maps that sum to the cosine, the tool's errors."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import models
from pipelines.bcos import add_inverse
from pipelines.evaluation.text_gallery import explain_texts
from pipelines.models import ModelSpec, ZeroShotNetwork
from stages.tools.explain_text import main
from tests.support.small_clip import SIDE, WIDTH, small_clip


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def test_ten_texts_cost_one_forward_pass_and_each_is_explained(towers):
    tower = models.load(towers["bcos"])[0].requires_grad_(False)
    calls = []
    tower.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    images, texts = add_inverse(torch.rand(1, 3, SIDE, SIDE)), torch.randn(10, WIDTH)
    cosines, weights = explain_texts(tower, images, texts)
    assert calls == [1]
    assert weights.shape == (10, 6, SIDE, SIDE)
    sums = ((images - tower.mean[:, None, None]) * weights).double().sum((1, 2, 3))
    assert torch.allclose(sums, cosines.double(), atol=1e-6)
    assert torch.allclose(cosines, ZeroShotNetwork(tower, texts)(images)[0])
    for place in (0, 9):
        alone = explain_texts(tower, images, texts[place : place + 1])
        assert torch.allclose(alone[1][0], weights[place], atol=1e-6)
    difference = explain_texts(tower, images, texts[:1])[1][0] - weights[1]
    assert torch.allclose(difference, weights[0] - weights[1], atol=1e-6)
    published = explain_texts(tower, images, texts, hold_norm=False)
    assert torch.equal(published[0], cosines)
    assert ((images - tower.mean[:, None, None]) * published[1]).double().sum((1, 2, 3)).abs().max() < 1e-6


def test_the_picture_has_a_column_for_each_text_and_difference(towers, image, tmp_path, capsys):
    sizes = []
    for name, more in (("a", []), ("b", []), ("c", ["--against", "a cat"]), ("d", ["--published"])):
        out = tmp_path / "new" / f"{name}.png"
        main(
            [
                towers["bcos"],
                image,
                "a dog",
                "an old house on a hill beside the sea",
                *more,
                "--out",
                str(out),
            ]
        )
        sizes.append(Image.open(out).size[0])
    assert sizes[0] == sizes[1] == sizes[3]
    # Six columns instead of three: the input, two texts, the text against them, two differences.
    assert sizes[2] == pytest.approx(sizes[0] * 6 / 3, abs=3)
    assert (tmp_path / "new/a.png").read_bytes() == (tmp_path / "new/b.png").read_bytes()
    assert (tmp_path / "new/a.png").read_bytes() != (tmp_path / "new/d.png").read_bytes()
    printed = capsys.readouterr().out
    assert "a dog: cosine" in printed
    assert "a cat: cosine" in printed


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    return str(error.value) + capsys.readouterr().err


def test_what_is_wrong_is_said_in_one_line(towers, image, tmp_path, capsys):
    bcos = towers["bcos"]
    assert "text" in error_of(capsys, bcos, image)
    assert "text 0 of 1 is empty" in error_of(capsys, bcos, image, " ")
    assert "original" in error_of(capsys, towers["original"], image, "a dog")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for path in ("broken.png", "nowhere.png"):
        told = error_of(capsys, bcos, str(tmp_path / path), "a dog")
        assert path in told
        assert "\n" not in told
    shutil.copytree(bcos, tmp_path / "alone")
    (tmp_path / "alone/text.json").unlink()
    assert "no text tower" in error_of(capsys, str(tmp_path / "alone"), image, "a dog")
    main(
        [
            str(tmp_path / "alone"),
            image,
            "a dog",
            "--text",
            towers["original"],
            "--out",
            str(tmp_path / "out.png"),
        ]
    )
    spec = ModelSpec("resnet8", ("a", "b"), SIDE, "bcos")
    models.save(tmp_path / "classifier", models.assemble(spec), spec)
    assert "not an image tower" in error_of(capsys, str(tmp_path / "classifier"), image, "a dog")
