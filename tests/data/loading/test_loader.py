"""The loader: each sample once, reproducible batches, contents of a batch, remote roots."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import random
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.loading import COUNT, assert_same, evaluate, keys, train, write
from tests.support.toy_source import SIDE, encoded, noise, plain, rich


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"), [rich(i) for i in range(COUNT)])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """All samples in one shard: fewer shards than ranks or processes."""
    return write(tmp_path_factory.mktemp("single"), [rich(i) for i in range(COUNT)], shard_size=100)


# Each sample once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", ["root", "single"])
def test_evaluation_gives_each_key_exactly_once(request, world_size, workers, shards):
    shards = request.getfixturevalue(shards)
    seen = []
    for rank in range(world_size):
        batches = evaluate(shards, rank=rank, world_size=world_size, workers=workers)
        got = list(batches)
        assert len(got) == len(batches)
        assert all(len(batch["key"]) == 4 for batch in got[:-1])
        seen += keys(got)
    assert sorted(seen) == [f"k{i:04d}" for i in range(COUNT)]


def test_more_ranks_and_workers_than_samples(tmp_path):
    shards = write(tmp_path, [plain(0), plain(1)])
    for workers in (0, 2):
        ranks = [evaluate(shards, rank=rank, world_size=3, workers=workers) for rank in range(3)]
        assert sorted(key for batches in ranks for key in keys(batches)) == ["k0000", "k0001"]
    with pytest.raises(ValueError, match="2 training samples cannot feed 3 workers"):
        train(shards, world_size=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_ranks_have_as_many_full_batches_and_no_sample_in_common(root, workers):
    ranks = [list(train(root, rank=rank, world_size=2, workers=workers)) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [COUNT // 6] * 2
    assert len(train(root, rank=1, world_size=2, workers=workers)) == COUNT // 6
    assert all(len(batch["key"]) == 3 for batches in ranks for batch in batches)
    seen = keys(ranks[0]) + keys(ranks[1])
    assert len(set(seen)) == len(seen)


def test_training_with_less_than_one_batch_gives_what_there_is(tmp_path):
    shards = write(tmp_path, [plain(i) for i in range(5)])
    ranks = [list(train(shards, batch_size=8, rank=rank, world_size=2)) for rank in range(2)]
    assert [[len(batch["key"]) for batch in batches] for batches in ranks] == [[2], [3]]
    assert len(set(keys(ranks[0]) + keys(ranks[1]))) == 5


def test_training_leaves_other_samples_out_each_epoch(single):
    missing = [
        set(range(COUNT)) - {int(key[1:]) for key in keys(train(single, epoch=epoch))} for epoch in range(12)
    ]
    assert all(len(each) == COUNT % 3 for each in missing)
    assert len({frozenset(each) for each in missing}) > 4


# The same again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_order_differs_by_epoch_and_seed_and_comes_again(root, workers):
    first = list(train(root, workers=workers))
    assert_same(first, train(root, workers=workers))
    orders = [
        keys(first),
        keys(train(root, epoch=1, workers=workers)),
        keys(train(root, seed=1, workers=workers)),
    ]
    assert len({tuple(order) for order in orders}) == 3
    assert keys(first) != sorted(keys(first))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # three processes on two cores
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("read", [train, evaluate])
def test_the_number_of_processes_changes_no_batch(root, read, workers):
    for rank in range(2):
        options = {"seed": 3, "epoch": 2, "rank": rank, "world_size": 2}
        assert_same(read(root, **options), read(root, workers=workers, **options))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("start", [1, 2, 3, 7, 9])
def test_start_batch_gives_the_tail_bit_for_bit_with_any_number_of_processes(root, workers, start):
    options = {"seed": 3, "epoch": 2}
    whole = list(train(root, **options))
    tail = train(root, start_batch=start, workers=workers, **options)
    assert len(tail) == max(0, len(whole) - start)
    assert_same(whole[start:], tail)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "layouts", [[(3, 2), (2, 9)], [(2, 1), (1, 9)], [(2, 1), (3, 1), (1, 9)], [(1, 1), (3, 1), (2, 9)]]
)
def test_other_numbers_of_ranks_share_out_what_is_left_of_an_epoch(root, workers, layouts):
    read, steps = [], 0
    for place, (world_size, batches) in enumerate(layouts):
        processes = workers + place if workers else 0  # another number of processes changes nothing
        options = {"workers": processes, "seed": 3, "epoch": 2}
        here = {
            "batch_size": 6 // world_size,
            "world_size": world_size,
            "earlier": layouts[:place],
            **options,
        }
        ranks = [train(root, rank=rank, **here) for rank in range(world_size)]
        assert len({len(each) for each in ranks}) == 1
        read += [key for each in ranks for key in keys(itertools.islice(each, batches))]
        if place == 0:
            before = [list(each) for each in ranks]
        elif batches == 9:
            for rank in range(world_size):  # a pass can also resume in the last layout
                assert_same(list(train(root, rank=rank, start_batch=1, **here)), list(ranks[rank])[1:])
        steps += min(batches, len(ranks[0]))
    assert len(read) == len(set(read)) == 6 * len(before[0])
    assert steps == len(before[0])


def test_start_batch_holds_in_evaluation(root):
    assert_same(list(evaluate(root, workers=2))[2:], evaluate(root, workers=2, start_batch=2))


def test_skipped_batches_are_not_read(root, tmp_path):
    shards = write(tmp_path, [plain(i) for i in range(10)])
    (tmp_path / "train-000000.tar").unlink()  # the shard of the first five samples
    assert keys(evaluate(shards, batch_size=5, start_batch=1)) == [f"k{i:04d}" for i in range(5, 10)]


def test_augmentation_of_a_sample_depends_on_neither_workers_nor_ranks(root):
    def image_of(loaders):
        return {
            key: image
            for each in loaders
            for batch in each
            for key, image in zip(batch["key"], batch["image"], strict=True)
        }

    one = image_of([train(root)])
    for other in ([train(root, workers=2)], [train(root, rank=rank, world_size=2) for rank in range(2)]):
        images = image_of(other)
        common = one.keys() & images.keys()
        assert len(common) > COUNT // 2
        assert all(torch.equal(one[key], images[key]) for key in common)
    later = image_of([train(root, epoch=1)])
    assert any(not torch.equal(one[key], later[key]) for key in one.keys() & later.keys())


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_are_left_alone(root, workers):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    batches = list(train(root, workers=workers))
    assert torch.equal(states[0], torch.get_rng_state())
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        assert_same(batches, train(root, workers=workers))


def test_no_process_is_left_behind(root):
    list(train(root, workers=2))
    batches = iter(train(root, workers=2))
    next(batches)
    del batches
    assert multiprocessing.active_children() == []


# What a batch holds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_holds_what_the_samples_hold(root, workers):
    for batch in evaluate(root, workers=workers):
        numbers = [int(key[1:]) for key in batch["key"]]
        samples = [rich(number) for number in numbers]
        assert batch["image"].dtype == torch.float32
        pixels = torch.stack([torch.from_numpy(noise(number)).permute(2, 0, 1) for number in numbers])
        assert torch.equal(batch["image"], pixels.float() / 255)
        assert batch["label"].tolist() == [number % 3 for number in numbers]
        assert batch["boxes"].tolist() == [
            [row, *box] for row, sample in enumerate(samples) for box in sample.boxes
        ]
        assert batch["boxes"].dtype == torch.float32
        assert batch["boxes"].shape[1:] == (6,)
        assert batch["group"].tolist() == [-1 if sample.group is None else sample.group for sample in samples]
        assert batch["caption"] == ["".join(sample.captions) for sample in samples]
        assert batch["mask"].dtype == torch.int64
        for mask, sample in zip(batch["mask"], samples, strict=True):
            expected = (
                np.zeros((SIDE, SIDE))
                if sample.mask is None
                else np.asarray(Image.open(io.BytesIO(sample.mask)))
            )
            assert (mask.numpy() == expected).all()
        assert batch["skipped"] == 0


def captioned(number: int):
    return plain(number, captions=tuple(f"{number}, text {text}" for text in range(number % 4)))


def test_one_of_several_captions_is_drawn_by_seed_epoch_and_key(tmp_path):
    shards = write(tmp_path, [captioned(number) for number in range(COUNT)])
    texts = {}
    for epoch in range(8):
        drawn = {}
        for options in (
            {"workers": 0},
            {"workers": 2},
            {"rank": 0, "world_size": 2},
            {"rank": 1, "world_size": 2},
        ):
            for batch in train(shards, epoch=epoch, **options):
                for key, caption in zip(batch["key"], batch["caption"], strict=True):
                    assert drawn.setdefault(key, caption) == caption
        for key, caption in drawn.items():
            texts.setdefault(int(key[1:]), set()).add(caption)
    for number, found in texts.items():
        assert found <= set(captioned(number).captions) | ({""} if number % 4 == 0 else set())
    assert sum(len(found) > 1 for number, found in texts.items() if number % 4 == 3) >= 4


def test_evaluation_takes_the_first_caption_and_gives_all_if_asked(tmp_path):
    shards = write(tmp_path, [captioned(number) for number in range(6)])
    [batch] = evaluate(shards, batch_size=6)
    assert batch["caption"] == ["".join(captioned(number).captions[:1]) for number in range(6)]
    assert "captions" not in batch
    [batch] = evaluate(shards, batch_size=6, fields=("captions",))
    assert batch["captions"] == [list(captioned(number).captions) for number in range(6)]
    assert "caption" not in batch


def test_bytes_are_the_same_images(root):
    for batch, other in zip(train(root), train(root, as_bytes=True), strict=True):
        assert other["image"].dtype == torch.uint8
        assert torch.equal(batch["image"], other["image"] / 255)
        assert_same([{**batch, "image": None}], [{**other, "image": None}])


def test_batch_has_no_field_that_no_sample_has(tmp_path):
    [batch] = evaluate(write(tmp_path, [plain(i) for i in range(4)]))
    assert set(batch) == {"key", "image", "label", "skipped"}


def test_labels_are_multi_hot(tmp_path):
    samples = [replace(plain(i), label=None, labels=labels) for i, labels in enumerate([(0, 2), (), (1,)])]
    [batch] = evaluate(write(tmp_path, samples, task="multilabel"))
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert batch["labels"].dtype == torch.float32


def test_exif_is_applied_only_where_there_are_no_boxes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(noise(0), exif=exif)
    samples = [plain(0, image=turned), plain(1, image=turned, boxes=((0, 0.0, 0.0, 2.0, 2.0),))]
    [batch] = evaluate(write(tmp_path, samples))
    stored = torch.from_numpy(noise(0)).permute(2, 0, 1).float() / 255
    assert torch.equal(batch["image"][0], stored.rot90(-1, (1, 2)))
    assert torch.equal(batch["image"][1], stored)


@pytest.mark.parametrize("fields", [(), ("boxes",), ("group", "mask")])
def test_fields_that_nobody_reads_are_left_out_and_change_nothing_else(root, fields):
    left_out = {"boxes", "mask", "group", "caption"}.difference(fields)
    whole = [
        {name: value for name, value in batch.items() if name not in left_out}
        for batch in train(root, epoch=1)
    ]
    assert_same(train(root, epoch=1, fields=fields), whole)


def test_images_lie_as_stored_where_boxes_are_left_out_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    boxed = plain(0, image=encoded(noise(0), exif=exif), boxes=((0, 0.0, 0.0, 2.0, 2.0),))
    [batch] = evaluate(write(tmp_path, [boxed]), fields=())
    assert torch.equal(batch["image"][0], torch.from_numpy(noise(0)).permute(2, 0, 1).float() / 255)


def test_boxes_and_masks_of_a_batch_stay_aligned(root):
    for epoch in range(4):
        for batch in train(root, epoch=epoch):
            for row, mask in enumerate(batch["mask"]):
                boxes = batch["boxes"][batch["boxes"][:, 0] == row, 2:]
                assert int(mask.max()) == len(boxes)
                for number, (xmin, ymin, xmax, ymax) in enumerate(boxes.int().tolist(), start=1):
                    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
                    inside[ymin:ymax, xmin:xmax] = True
                    assert torch.equal(mask == number, inside)


# Remote roots -----------------------------------------------------------------------------------------------


def test_file_and_memory_roots_give_the_same_batches(root):
    remote = "memory://loader/toy"
    write(remote, [rich(i) for i in range(COUNT)])
    assert_same(train(root), train(f"file://{root}"))
    assert_same(train(root), train(remote, verify=True))
    assert_same(train(root, workers=2), train(remote, workers=2))


def test_http_root(root):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert_same(evaluate(root), evaluate(url))
        assert_same(evaluate(root, workers=2), evaluate(url, workers=2))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
