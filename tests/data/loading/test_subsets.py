"""Few-shot subsets: the drawn images, and that the loader reads these alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.data.loading.loader import loader
from pipelines.data.loading.subsets import annotated_images, few_shot
from pipelines.data.shards.sample import DataError
from pipelines.data.shards.writer import write_shards
from pipelines.distributed import Context
from pipelines.params import DataParams
from tests.support.toy_source import SIDE, ToySource, plain

COUNT = 40


def labelled(index):
    return replace(plain(index), label=index % 2)


def write(out, samples, shard_size=7, task="multiclass"):
    write_shards(ToySource({"train": samples}, task), Path("raw"), out, shard_size=shard_size, progress=False)
    return str(out)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"), [labelled(index) for index in range(COUNT)])


def batches(root, *, workers=0, rank=0, world_size=1, **options):
    data = DataParams(image_size=SIDE, augment="none", loader_workers=workers)
    return loader(root, "train", data, 3, context=Context(rank, world_size), **options)


def test_each_class_has_its_share_and_the_draw_is_the_seeds(tmp_path):
    root = write(tmp_path, [plain(index) for index in range(30)])
    drawn = few_shot(root, "train", 4, seed=1)
    labels = Counter(int(key[1:]) % 3 for key in drawn.keys)
    assert labels == {0: 4, 1: 4, 2: 4}
    assert drawn == few_shot(root, "train", 4, seed=1)
    assert drawn.keys != few_shot(root, "train", 4, seed=2).keys
    assert [f"k{number:04d}" for number in drawn.numbers] == list(drawn.keys)
    assert list(drawn.numbers) == sorted(drawn.numbers)


def test_fewer_shots_are_among_more_and_shards_do_not_matter(tmp_path):
    samples = [plain(index) for index in range(30)]
    root, other = write(tmp_path / "one", samples), write(tmp_path / "other", samples[::-1], shard_size=100)
    assert set(few_shot(root, "train", 3, seed=0).keys) < set(few_shot(root, "train", 7, seed=0).keys)
    assert set(few_shot(root, "train", 3, seed=0).keys) == set(few_shot(other, "train", 3, seed=0).keys)


def test_of_several_labels_each_class_has_at_least_its_share(tmp_path):
    samples = [plain(index, label=None, labels=tuple({index % 3, index % 2})) for index in range(30)]
    drawn = few_shot(write(tmp_path, samples, task="multilabel"), "train", 3, seed=0)
    counts = Counter(label for number in drawn.numbers for label in {number % 3, number % 2})
    assert min(counts[label] for label in range(3)) >= 3
    assert len(drawn.keys) == len(set(drawn.keys)) <= 9


def test_a_class_of_fewer_images_gives_them_all_and_the_log_counts_such_classes(tmp_path, caplog):
    samples = [plain(index, label=label) for index, label in enumerate([0] * 9 + [1] * 2 + [2])]
    root = write(tmp_path, samples)
    drawn = few_shot(root, "train", 3, seed=0)
    assert Counter(samples[number].label for number in drawn.numbers) == {0: 3, 1: 2, 2: 1}
    assert caplog.messages == [
        "shots: 3 images a class; 2 of 3 classes have fewer in train and give all ('star' has 1)"
    ]
    caplog.clear()
    assert len(few_shot(root, "train", 1, seed=0).keys) == 3
    assert caplog.messages == []


def test_of_several_labels_a_class_without_images_gives_none(tmp_path, caplog):
    samples = [plain(index, label=None, labels=(0, 1)) for index in range(5)]
    root = write(tmp_path, samples, task="multilabel")
    assert len(few_shot(root, "train", 2, seed=0).keys) == 2
    assert caplog.messages == [
        "shots: 2 images a class; 1 of 3 classes have fewer in train and give all ('star' has 0)"
    ]


def test_no_labels_are_one_line(tmp_path):
    captions = [plain(index, label=None, captions=("a shape",)) for index in range(8)]
    with pytest.raises(DataError, match=r"^shots: images without labels cannot be drawn class by class$"):
        few_shot(write(tmp_path / "one", captions, task="caption"), "train", 1, seed=0)
    unlabelled = [plain(index, label=None, labels=()) for index in range(8)]
    with pytest.raises(DataError, match=r"^shots: no image of train has a class$"):
        few_shot(write(tmp_path / "other", unlabelled, task="multilabel"), "train", 1, seed=0)


def test_the_loader_gives_the_subset_alone_each_image_once(root):
    numbers = (0, 6, 7, 8, 20, 33, 39)
    wanted = [f"k{number:04d}" for number in numbers]
    for workers in (0, 2):
        for world_size in (1, 2):
            seen = [
                key
                for rank in range(world_size)
                for batch in batches(root, subset=numbers, workers=workers, rank=rank, world_size=world_size)
                for key in batch["key"]
            ]
            assert sorted(seen) == wanted
    assert len(batches(root, subset=numbers)) == 3


def test_in_training_the_subset_is_shuffled_and_dealt_in_full_batches(root):
    numbers = (0, 6, 7, 8, 20, 33, 39)
    wanted = {f"k{number:04d}" for number in numbers}
    epochs = [
        [key for batch in batches(root, subset=numbers, train=True, epoch=epoch) for key in batch["key"]]
        for epoch in range(20)
    ]
    assert all(len(keys) == len(set(keys)) == 6 and set(keys) < wanted for keys in epochs)
    assert set().union(*epochs) == wanted
    assert len({tuple(keys) for keys in epochs}) > 10
    whole = list(batches(root, subset=numbers, train=True))
    assert [batch["key"] for batch in batches(root, subset=numbers, train=True, start_batch=1)] == [
        whole[1]["key"]
    ]


# Annotated images -------------------------------------------------------------------------------------------


def boxed(index):
    labels = tuple(sorted({index % 3, index % 2}))
    boxes = tuple((label, 0.0, 0.0, 2.0, 2.0) for label in labels) if index % 5 else ()
    return plain(index, label=None, labels=labels, boxes=boxes)


def test_each_class_has_its_share_of_the_images_with_a_box_of_it(tmp_path):
    samples = [boxed(index) for index in range(300)]
    root = write(tmp_path, samples, task="multilabel")
    with_box = {sample.key: {box[0] for box in sample.boxes} for sample in samples}
    for share in (0.01, 0.1, 0.5):
        keys = annotated_images(root, "train", share, seed=1)
        assert keys == annotated_images(root, "train", share, seed=1)
        assert keys != annotated_images(root, "train", share, seed=2)
        for label in range(3):
            of_class = [key for key, found in with_box.items() if label in found]
            assert len([key for key in keys if label in with_box[key]]) >= share * len(of_class)
        assert len(keys) <= share * 240 * 1.5 + 3
    assert len(annotated_images(root, "train", 1.0, seed=1)) == 240


def test_a_share_of_no_boxes_is_an_error(root):
    with pytest.raises(DataError, match="no image of train has a box: guidance needs some"):
        annotated_images(root, "train", 0.1, seed=0)
