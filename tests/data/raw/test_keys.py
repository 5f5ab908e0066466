"""Keys are valid and unique, whatever the names are."""

import pytest

from pipelines.data.raw.keys import in_part, keys_of
from pipelines.data.shards.sample import KEY

LONG = "Northern_cardinal_female_asset_2021-05-14_backyard_feeder_IMG_0042_JPG.rf." + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "names",
    [
        ["cat_0", "cat_1"],
        [LONG, LONG + "0", LONG[:90], LONG[:91]],
        ["", "."],
        ["Cat_1", "cat_1", "CAT_1"],
        ["a b", "a_b", "a.b", "ä b", "a\nb"],
        ["図", "画", "\ud83d\ude00"[:0] + "🦉", "a\u0301", "á"],
        ["/etc/passwd", "../../x", "..."],
        ["x-0123456789abcdef", "X-0123456789ABCDEF"],
    ],
)
def test_keys_are_valid_differ_in_any_file_system_and_depend_on_the_paths_alone(names):
    paths = {f"train/{number}/{name}.jpg": name for number, name in enumerate(names)}
    keys = keys_of(paths)
    assert keys.keys() == paths.keys()
    assert all(KEY.fullmatch(key) for key in keys.values())
    assert len({key.lower() for key in keys.values()}) == len(names)
    assert keys_of(dict(reversed(paths.items()))) == keys


def test_a_name_that_can_be_a_key_is_one():
    assert keys_of({"train/cat/img-1.jpg": "cat_img-1"}) == {"train/cat/img-1.jpg": "cat_img-1"}


def test_no_name_is_another_ones_hashed_key():
    """A file named like the hashed key of another file gets another key."""
    first = keys_of({"a": "x y", "b": "x_y"})
    names = {"a": "x y", "b": "x_y", "c": first["a"], "d": first["b"].upper()}
    assert len({key.lower() for key in keys_of(names).values()}) == 4


def test_keys_of_several_data_sets_are_valid_and_differ():
    keys = [
        in_part(number, key)
        for number in (0, 1, 11)
        for key in ("1_x", "x", "1", LONG[:90].replace(".", "_"), "y" * 90, "y" * 89 + "z")
    ]
    assert all(KEY.fullmatch(key) for key in keys)
    assert len({key.lower() for key in keys}) == len(keys)
    assert keys[:2] == ["0_1_x", "0_x"]
