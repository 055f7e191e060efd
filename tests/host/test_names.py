"""Names of folders: whatever a name holds, its folder lies where it should, and is no other name's."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dmquant.host.names import folder_of, readable

names = st.text(min_size=1, max_size=30) | st.text("aAbB/\\.-_ :", min_size=1, max_size=6)


@given(names)
@example("../../../x")
@example("/abs")
@example("C:\\x")
@example("..")
@example("con.txt")
@example("\ud800")
@example("x" * 5000)
def test_a_folder_is_one_plain_part_of_a_path(name):
    for folder in (folder_of(name), readable(name)):
        assert re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,79}", folder)
        assert not folder.endswith(".")
        assert folder.partition(".")[0].upper() not in ("CON", "NUL", "AUX", "PRN", "COM1", "LPT1")


@given(names, names)
@example("x/y", "x_y")
@example("Mine", "mine")
@example("x", "x.")
@example("é", "e\u0301")
@example("n" * 100, "n" * 99)
def test_two_names_have_two_folders_whatever_the_case(one, other):
    assert one == other or folder_of(one).lower() != folder_of(other).lower()


@given(names)
def test_the_folder_of_a_name_is_taken_by_no_name_that_looks_like_it(name):
    folder = folder_of(name)
    assert folder == name or folder_of(folder) != folder


@pytest.mark.parametrize("name", ["default", "w4a6", "rtn-fp4_e2m1-fp6_e2m3", "mine_2.1+x"])
def test_usual_names_are_folders_as_they_are(name):
    assert folder_of(name) == name
    assert readable(f"PixArt-Sigma-XL-2-{name}") == f"PixArt-Sigma-XL-2-{name}"
