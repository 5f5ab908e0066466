"""The loader: each sample once, the same batches again, and one line about what is wrong."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import random
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.data.loading.decode import DecodeError
from pipelines.data.loading.loader import loader
from pipelines.data.loading.sampling import Sampling, batched, epoch_order, rank_batches, rank_share, shuffled
from pipelines.data.shards.manifest import ShardError
from pipelines.data.shards.writer import write_shards
from pipelines.distributed import Context
from pipelines.params import DataParams
from tests.support.toy_source import SIDE, ToySource, encoded, noise, plain, rich

COUNT, SHARD_SIZE = 23, 5
DATA = DataParams(image_size=SIDE, augment="pad_crop_flip", crop_padding=2, shuffle_buffer=6)
SAMPLING = Sampling(batch_size=3, rank=0, world_size=1, train=True, seed=0, epoch=0, shuffle_buffer=6)


def write(out, samples, *, shard_size=SHARD_SIZE, task="multiclass"):
    write_shards(ToySource({"train": samples}, task), Path("raw"), out, shard_size=shard_size, progress=False)
    return str(out)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"), [rich(i) for i in range(COUNT)])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """All samples in one shard: fewer shards than ranks or processes."""
    return write(tmp_path_factory.mktemp("single"), [rich(i) for i in range(COUNT)], shard_size=100)


def evaluate(root, *, batch_size=4, workers=0, on_error="raise", verify=False, rank=0, world_size=1, **options):
    data = DATA.model_copy(update={"loader_workers": workers, "on_error": on_error, "verify": verify})
    return loader(root, "train", data, batch_size, context=Context(rank, world_size), **options)


def train(root, **options):
    return evaluate(root, **{"batch_size": 3, "train": True, **options})


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def assert_same(some, others):
    """Batches are equal, bit for bit and in all their fields."""
    some, others = list(some), list(others)
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[name]), name
            else:
                assert value == other[name], name


# Order -----------------------------------------------------------------------------------------------------------------


def test_shuffled_is_a_permutation_that_reaches_as_far_as_its_buffer():
    items = list(range(100))
    for size in (1, 7, 100, 1000):
        order = list(shuffled(items, size, random.Random(0)))
        assert sorted(order) == items
        assert all(item - place < size for place, item in enumerate(order))
    assert list(shuffled(items, 1, random.Random(0))) == items
    assert list(shuffled(items, 100, random.Random(0))) != list(shuffled(items, 100, random.Random(1)))


def test_batched_keeps_all_in_order():
    assert list(batched(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batched([], 3)) == []


def test_epoch_order_keeps_shards_together_and_differs_by_epoch():
    counts = [3, 4, 2]
    orders = [epoch_order(counts, replace(SAMPLING, epoch=epoch)) for epoch in range(20)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) > 10
    for order in orders:  # going round, each shard's numbers follow one another
        steps = sum((b - a) != 1 for a, b in zip(order, [*order[1:], order[0]], strict=True))
        assert steps <= 3
    assert epoch_order(counts, replace(SAMPLING, epoch=5, train=False)) == list(range(9))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 13, 50])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_divide_an_epoch(count, batch_size, world_size):
    for training in (False, True):
        sampling = replace(SAMPLING, batch_size=batch_size, world_size=world_size, train=training)
        if training and count < world_size:
            with pytest.raises(ValueError, match="cannot feed"):
                rank_share(count, sampling)
            continue
        shares = [rank_share(count, replace(sampling, rank=rank)) for rank in range(world_size)]
        places = [place for each in shares for place in each]
        assert places == list(range(len(places)))
        ranks = [rank_batches(range(count), replace(sampling, rank=rank)) for rank in range(world_size)]
        for batches, each in zip(ranks, shares, strict=True):
            assert sorted(place for batch in batches for place in batch) == list(each)
            assert all(len(batch) == batch_size for batch in batches[:-1])
        if not training:
            assert len(places) == count
            continue
        assert {len(batches) for batches in ranks} == {max(1, count // (world_size * batch_size))}
        if count >= world_size * batch_size:
            assert all(len(batch) == batch_size for batches in ranks for batch in batches)


def test_a_rank_in_training_is_shuffled_through_one_buffer():
    sampling = replace(SAMPLING, rank=1, world_size=2, seed=5, epoch=2, shuffle_buffer=4)
    order = epoch_order([7, 7, 7], sampling)
    expected = list(shuffled(order[9:18], 4, random.Random("buffer/5/2/1")))
    assert rank_batches(order, sampling) == [expected[:3], expected[3:6], expected[6:]]


# Each sample once ------------------------------------------------------------------------------------------------------


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
    missing = [set(range(COUNT)) - {int(key[1:]) for key in keys(train(single, epoch=epoch))} for epoch in range(12)]
    assert all(len(each) == COUNT % 3 for each in missing)
    assert len({frozenset(each) for each in missing}) > 4


# The same again --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_order_differs_by_epoch_and_seed_and_comes_again(root, workers):
    first = list(train(root, workers=workers))
    assert_same(first, train(root, workers=workers))
    orders = [keys(first), keys(train(root, epoch=1, workers=workers)), keys(train(root, seed=1, workers=workers))]
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
@pytest.mark.parametrize("layouts", [[(3, 2), (2, 9)], [(2, 1), (1, 9)], [(2, 1), (3, 1), (1, 9)], [(1, 1), (3, 1), (2, 9)]])
def test_other_numbers_of_ranks_share_out_what_is_left_of_an_epoch(root, workers, layouts):
    read, steps = [], 0
    for place, (world_size, batches) in enumerate(layouts):
        processes = workers + place if workers else 0  # another number of processes changes nothing
        options = {"workers": processes, "seed": 3, "epoch": 2}
        here = {"batch_size": 6 // world_size, "world_size": world_size, "earlier": layouts[:place], **options}
        ranks = [train(root, rank=rank, **here) for rank in range(world_size)]
        assert len({len(each) for each in ranks}) == 1
        read += [key for each in ranks for key in keys(itertools.islice(each, batches))]
        if place == 0:
            before = [list(each) for each in ranks]
        elif batches == 9:
            for rank in range(world_size):  # and a pass that goes on in the last layout does so as ever
                assert_same(list(train(root, rank=rank, start_batch=1, **here)), list(ranks[rank])[1:])
        steps += min(batches, len(ranks[0]))
    assert len(read) == len(set(read)) == 6 * len(before[0])
    assert steps == len(before[0])


def test_start_batch_holds_in_evaluation(root):
    assert_same(list(evaluate(root, workers=2))[2:], evaluate(root, workers=2, start_batch=2))


def test_skipped_batches_are_not_read(root, tmp_path):
    shards = write(tmp_path, [plain(i) for i in range(10)])
    (tmp_path / "train-000000.tar").unlink()  # holds the first five
    assert keys(evaluate(shards, batch_size=5, start_batch=1)) == [f"k{i:04d}" for i in range(5, 10)]


def test_augmentation_of_a_sample_depends_on_neither_workers_nor_ranks(root):
    def image_of(loaders):
        return {key: image for each in loaders for batch in each for key, image in zip(batch["key"], batch["image"], strict=True)}

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


# What a batch holds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_holds_what_the_samples_hold(root, workers):
    for batch in evaluate(root, workers=workers):
        numbers = [int(key[1:]) for key in batch["key"]]
        samples = [rich(number) for number in numbers]
        assert batch["image"].dtype == torch.float32
        pixels = torch.stack([torch.from_numpy(noise(number)).permute(2, 0, 1) for number in numbers])
        assert torch.equal(batch["image"], pixels.float() / 255)
        assert batch["label"].tolist() == [number % 3 for number in numbers]
        assert batch["boxes"].tolist() == [[row, *box] for row, sample in enumerate(samples) for box in sample.boxes]
        assert batch["boxes"].dtype == torch.float32
        assert batch["boxes"].shape[1:] == (6,)
        assert batch["group"].tolist() == [-1 if sample.group is None else sample.group for sample in samples]
        assert batch["caption"] == [sample.caption or "" for sample in samples]
        assert batch["mask"].dtype == torch.int64
        for mask, sample in zip(batch["mask"], samples, strict=True):
            expected = np.zeros((SIDE, SIDE)) if sample.mask is None else np.asarray(Image.open(io.BytesIO(sample.mask)))
            assert (mask.numpy() == expected).all()
        assert batch["skipped"] == 0


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
    whole = [{name: value for name, value in batch.items() if name not in left_out} for batch in train(root, epoch=1)]
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


# Remote roots ----------------------------------------------------------------------------------------------------------


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


# Bad input -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    return Path(write(tmp_path, [plain(i) for i in range(12)]))


def assert_refused(says, *, kind=ShardError, root, **options):
    """Raised in one line, in this process and from loader processes alike."""
    for workers in (0, 2):
        with pytest.raises(kind, match=says) as caught:
            list(evaluate(root, workers=workers, **options))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_truncated_shard(shards, keep):
    path = shards / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(rf"train-000001.tar: truncated: {keep} bytes; the manifest says \d+", root=shards)


@pytest.mark.parametrize("keep", [0, 100, 1000, 3000])
def test_truncated_shard_of_the_right_size_in_the_manifest(shards, keep):
    path = shards / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    edit_shard(shards, 1, bytes=keep)
    assert_refused(r"train-000001.tar: ", root=shards)


def edit_shard(root: Path, number: int, **changes):
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["splits"]["train"][number].update(changes)
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_missing_shard(shards):
    (shards / "train-000002.tar").unlink()
    assert_refused("train-000002.tar: missing", root=shards)


def test_count_that_is_not_the_manifests(shards):
    edit_shard(shards, 0, count=4)
    assert_refused("train-000000.tar: 5 samples; the manifest says 4", root=shards)


def test_sha256_is_checked_when_asked(shards):
    path = shards / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the padding at the end, where nothing else would notice
    path.write_bytes(content)
    assert len(keys(evaluate(shards))) == 12
    assert_refused("train-000001.tar: sha256 is [0-9a-f]{64}; the manifest says", root=shards, verify=True)


@pytest.mark.parametrize("name", ["manifest.json", "train-000000.tar"])
def test_missing_on_a_remote_root(name):
    write("memory://loader/missing", [plain(0)])
    import fsspec

    fsspec.filesystem("memory").rm(f"/loader/missing/{name}")
    with pytest.raises(ShardError, match=f"no {name}" if name.endswith("json") else f"{name}: missing"):
        list(evaluate("memory://loader/missing"))


def replace_shard(root: Path, files: dict[str, bytes], count: int = 1):
    """Puts a tar of these files in the place of the first shard."""
    with tarfile.open(root / "train-000000.tar", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    edit_shard(root, 0, bytes=(root / "train-000000.tar").stat().st_size, count=count)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a.png": b""}, "train-000000.tar: a has png; one image and a json are needed"),
        ({"a.json": b"{}"}, "train-000000.tar: a has json"),
        ({"a.json": b"{}", "a.png": b"", "a.jpg": b""}, "train-000000.tar: a has json, png, jpg"),
        ({"a.png": b"", "a.json": b"{"}, "train-000000.tar: a: its json is not that of task multiclass"),
        ({"a.png": b"", "a.json": b"[1]"}, "train-000000.tar: a: its json is not that of task multiclass"),
        ({"a.png": b"", "a.json": b"{}"}, "train-000000.tar: a: its json is not that of task multiclass"),
        ({"a.png": b"", "a.json": b'{"label": 3}'}, "train-000000.tar: a: label 3 is out of range; there are 3 classes"),
        ({"a.png": b"", "a.json": b'{"label": "x"}'}, "train-000000.tar: a: its json is not that"),
    ],
)
def test_sample_that_is_none(shards, files, says):
    replace_shard(shards, files)
    with pytest.raises(ShardError, match=says):
        list(evaluate(shards, on_error="skip"))


def test_foreign_files_in_a_shard_are_never_decoded(shards):
    pickle = b"cos\nsystem\n(S'exit 1'\ntR."
    image = plain(0).image
    replace_shard(shards, {"a.pyd": pickle, "a.png": image, "a.json": b'{"label": 1}', "b.pkl": pickle})
    batch = next(iter(evaluate(shards, batch_size=1)))
    assert (batch["key"], batch["label"].tolist()) == (["a"], [1])


def test_another_shard_under_a_name_that_was_read_is_scanned_anew(shards):
    assert keys(evaluate(shards))[0] == "k0000"
    replace_shard(shards, {"new.json": b'{"label": 1}', "new.png": plain(0).image})
    assert keys(evaluate(shards))[0] == "new"


BROKEN = (3, 6, 7)


@pytest.fixture
def broken(tmp_path):
    """Twelve samples; three images do not decode."""
    samples = [plain(i, image=encoded(noise(i))[:60]) if i in BROKEN else plain(i) for i in range(12)]
    return write(tmp_path, samples)


def test_image_that_does_not_decode_is_named(broken):
    assert_refused(r"train-000000.tar: k0003: does not decode: ", kind=DecodeError, root=broken)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [False, True])
def test_skipped_images_are_left_out_and_counted(broken, workers, training):
    whole = partial(train if training else evaluate, broken, batch_size=4, workers=workers, on_error="skip")
    batches = whole()
    got = list(batches)
    assert batches.skipped == 3 == sum(batch["skipped"] for batch in got)
    assert sorted(keys(got)) == [f"k{i:04d}" for i in range(12) if i not in BROKEN]
    assert all(len(batch["key"]) == len(batch["image"]) == 4 - batch["skipped"] for batch in got)
    assert_same(got[1:], whole(start_batch=1))
    list(batches)
    assert batches.skipped == 3  # of one pass


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_of_which_nothing_decodes(broken, workers):
    batches = evaluate(broken, batch_size=1, on_error="skip", workers=workers)
    assert len(list(batches)) == 9  # evaluation goes on without it
    assert batches.skipped == 3
    with pytest.raises(DecodeError, match=r"train-00000\d.tar: k000\d: does not decode"):
        list(train(broken, batch_size=1, on_error="skip", workers=workers))  # training has other ranks that wait


@pytest.mark.parametrize(
    "image",
    [
        encoded(noise(0)[..., 0]),
        encoded(np.concatenate([noise(0), noise(1)[..., :1]], axis=2)),
        encoded(noise(0)[..., 0].astype(np.uint16) * 257),
    ],
    ids=["1 channel", "4 channels", "16 bits"],
)
def test_images_of_other_channels_and_depths_are_converted(tmp_path, image):
    [batch] = evaluate(write(tmp_path, [plain(0, image=image), plain(1)]))
    assert batch["image"].shape == (2, 3, SIDE, SIDE)
    assert batch["image"][0].std() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"rank": 2, "world_size": 2},
        {"rank": -1},
        {"start_batch": -1},
        {"fields": "box"},
    ],
)
def test_arguments_out_of_range(root, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        evaluate(root, **options)


def test_unknown_split_is_named(root):
    with pytest.raises(ShardError, match=r"split 'val' is not in the shards \(they have train\)"):
        loader(root, "val", DATA, 1)
