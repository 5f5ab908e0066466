"""Invalid boxes are clipped, dropped or refused."""

import pytest

from pipelines.data.formats.boxes import BoxCheck
from pipelines.data.formats.left_out import LeftOut
from pipelines.data.shards.sample import DataError

SIZE = (100, 50)  # width, height


@pytest.mark.parametrize(
    ("corners", "clipped"),
    [
        ((0, 0, 100, 50), (0, 0, 100, 50)),
        ((-0.4, 3, 20, 50.9), (0, 3, 20, 50)),
        ((-1, -1, 101, 51), (0, 0, 100, 50)),
        ((99, 49, 100, 50), (99, 49, 100, 50)),
    ],
)
def test_a_box_is_kept_within_its_image(corners, clipped):
    check = BoxCheck("raise", LeftOut())
    assert check(corners, *SIZE, "x") == clipped
    assert check.clipped == (corners != clipped)


@pytest.mark.parametrize(
    ("corners", "fault"),
    [
        ((10, 10, 5, 20), "inverted"),
        ((10, 20, 20, 10), "inverted"),
        ((-2, 0, 20, 20), "outside"),
        ((10, 10, 102, 20), "outside"),
        ((200, 10, 220, 20), "outside"),
        ((10, 10, 10, 20), "empty"),
        ((10, 10, 20, 10.5), "empty"),
        ((100, 10, 101, 20), "empty"),
    ],
)
def test_a_bad_box_is_refused_by_name_or_dropped_and_counted(corners, fault):
    with pytest.raises(
        DataError,
        match=rf"^some\.xml: object 3: box \[{corners[0]}, .* is {fault}[^\n]*on_bad_box: skip[^\n]*$",
    ):
        BoxCheck("raise", LeftOut())(corners, *SIZE, "some.xml: object 3")
    for check in (BoxCheck("skip", LeftOut()), BoxCheck("raise", LeftOut(), expected=(fault,))):
        assert check(corners, *SIZE, "x") is None
        assert check.left_out.counts == {f"{fault} boxes": 1}


def test_a_number_that_is_not_finite_is_never_skipped():
    with pytest.raises(DataError, match="not finite"):
        BoxCheck("skip", LeftOut())((0, float("nan"), 10, 10), *SIZE, "x")
