import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.calib.data.tree import flatten, may_be_padded, of_rows, unflatten
from dmquant.errors import UserError

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TENSORS = st.lists(st.integers(0, 9), max_size=3).map(torch.tensor)
TREES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@settings(deadline=None)
@given(TREES)
def test_a_tree_comes_back_exactly_through_json(tree):
    skeleton, leaves = flatten(tree)
    assert same(unflatten(json.loads(json.dumps(skeleton)), [leaf.tensor for leaf in leaves]), tree)


def test_leaves_say_where_they_were_found_in_order():
    one = torch.zeros(1)
    _, leaves = flatten({"sample": one, "added": {"ids": one}, "rotary": (one, [None, one])})
    assert [leaf.name for leaf in leaves] == ["sample", "added.ids", "rotary[0]", "rotary[1][1]"]


def test_the_argument_is_the_outermost_key():
    one = torch.zeros(1)
    _, leaves = flatten({"sample": one, "added": {"ids": one}, "rotary": (one, [None, one])})
    assert [leaf.argument for leaf in leaves] == ["sample", "added", "rotary", "rotary"]


def test_a_size_is_a_tuple():
    assert unflatten(*flatten((torch.zeros(2, 3).shape, None))) == ((2, 3), None)


@pytest.mark.parametrize(
    ("tree", "place", "kind"),
    [
        ({"dtype": torch.float32}, "dtype", "dtype"),
        ({"added": {"masks": [None, {1, 2}]}}, r"added\.masks\[1\]", "set"),
        ({"by_layer": {3: None}}, "by_layer", "dict"),
    ],
)
def test_what_cannot_be_kept_is_named(tree, place, kind):
    with pytest.raises(UserError, match=f"{place} is of type {kind}"):
        flatten(tree)


def test_what_differs_between_calls_is_marked_in_the_skeleton_of_some_rows():
    """Of a call of three rows the last and first; a mask that is true everywhere is none."""
    tokens, mask = torch.ones(3, 4, 2), torch.ones(3, 4, dtype=torch.bool)
    arguments = {"x": torch.zeros(3), "text": tokens, "mask": mask, "sizes": [(1, 2), (3, 4), (5, 6)], "scale": 1.0}
    skeleton, leaves = flatten(arguments)
    marked = of_rows(skeleton, [2, 0], {"text": "mask"}, ["sizes"])
    assert may_be_padded(skeleton) == frozenset()
    assert may_be_padded(marked) == {1, 2}
    tensors = [leaf.tensor for leaf in leaves]
    whole = unflatten(json.loads(json.dumps(marked)), tensors, 2)
    assert whole["sizes"] == [(5, 6), (1, 2)] * 2
    assert whole["mask"] is None
    assert whole["text"] is tokens
    tensors[2] = mask.logical_and(torch.arange(4) < 3)
    assert unflatten(marked, tensors)["mask"] is tensors[2]
    one_for_all = flatten(arguments | {"sizes": [(1, 2)]})[0]  # several images of one prompt
    assert unflatten(of_rows(one_for_all, range(3), {}, ["sizes"]), tensors)["sizes"] == [(1, 2)] * 3
