import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.calib.data.tree import flatten, unflatten
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
