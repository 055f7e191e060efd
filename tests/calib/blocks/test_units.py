"""Units: which layers are decided together, and against the output of which module."""

import pytest

from dmquant.calib.blocks.units import Block, Task, tasks_of
from dmquant.recipe import Learning


def block(name, layers, is_layer=False):
    return Block(name, tuple(layers), is_layer, None, 0, 0, 0)


BLOCKS = [
    block("embed", ["embed"], is_layer=True),
    block("b.0", ["b.0.q", "b.0.ff"]),
    block("b.1", ["b.1.q", "b.1.ff"]),
    block("b.2", ["b.2.q"]),
    block("out", ["out"], is_layer=True),
]
B0, B1, B2 = (one.layers for one in BLOCKS[1:4])


@pytest.mark.parametrize(
    ("unit", "number", "tasks"),
    [
        ("layer", 1, [Task("b.0.q", ("b.0.q",), ("b.0",)), Task("b.0.ff", ("b.0.ff",), ("b.0",))]),
        ("block", 1, [Task("b.0", B0, ("b.0",))]),
        ("window", 1, [Task("b.1", (*B0, *B1), ("b.0", "b.1"), held=B1)]),
        ("window", 2, [Task("b.2", (*B1, *B2), ("b.1", "b.2"))]),  # the last: it decides all of its blocks
        ("window", 3, [Task("b.2", B2, ("b.2",))]),  # when codes of its window are lost
        ("window", 0, [Task("embed", ("embed",), ("embed",))]),
        ("layer", 4, [Task("out", ("out",), ("out",))]),
        ("window", 4, [Task("out", ("out",), ("out",))]),
    ],
)
def test_tasks_by_unit(unit, number, tasks):
    assert tasks_of(BLOCKS, number, Learning(unit=unit)) == tasks


def test_a_window_reaches_as_far_as_it_is_wide():
    assert tasks_of(BLOCKS, 1, Learning(unit="window", window=3)) == [
        Task("b.2", (*B0, *B1, *B2), ("b.0", "b.1", "b.2"))
    ]


@pytest.mark.parametrize("unit", ["layer", "block", "window"])
def test_every_layer_is_decided_in_its_own_turn(unit):
    for number, own in enumerate(BLOCKS):
        decided = [layer for task in tasks_of(BLOCKS, number, Learning(unit=unit)) for layer in task.layers]
        assert set(own.layers) <= set(decided)
