"""The choice of options within a size, against trying all of them."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.calib.choice.allocation import cheapest, smallest, total, uniform
from dmquant.errors import UserError

OPTIONS = ("small", "middle", "large")
LAYERS = st.lists(
    st.tuples(*(st.tuples(st.integers(1, 1000), st.floats(0, 1e3)) for _ in OPTIONS)), min_size=1, max_size=5
)


def as_tables(layers):
    named = {f"layer{number}": dict(zip(OPTIONS, of_layer, strict=True)) for number, of_layer in enumerate(layers)}
    costs = {name: {option: cost for option, (_, cost) in of_layer.items()} for name, of_layer in named.items()}
    sizes = {name: {option: size for option, (size, _) in of_layer.items()} for name, of_layer in named.items()}
    return costs, sizes


@settings(deadline=None, max_examples=60)
@given(layers=LAYERS, share=st.floats(0, 1))
def test_it_is_the_cheapest_of_all_choices_that_fit(layers, share):
    costs, sizes = as_tables(layers)
    largest = sum(max(of_layer.values()) for of_layer in sizes.values())
    most = int(smallest(sizes) + share * (largest - smallest(sizes)))
    found = cheapest(costs, sizes, most)
    every = [dict(zip(costs, chosen, strict=True)) for chosen in itertools.product(OPTIONS, repeat=len(costs))]
    fitting = [chosen for chosen in every if total(sizes, chosen) <= most]
    best = min(sum(costs[layer][option] for layer, option in chosen.items()) for chosen in fitting)
    assert found.bytes == total(sizes, found.options) <= most
    assert found.cost == pytest.approx(sum(costs[layer][option] for layer, option in found.options.items()))
    assert found.cost <= best + 1e-3 * max(best, max(map(max, (one.values() for one in costs.values()))) * 1e-3)


def test_layers_may_lack_options():
    costs = {"one": {"small": 5.0}, "other": {"small": 4.0, "large": 1.0}}
    sizes = {"one": {"small": 10}, "other": {"small": 10, "large": 20}}
    assert cheapest(costs, sizes, 30).options == {"one": "small", "other": "large"}
    assert cheapest(costs, sizes, 29).options == {"one": "small", "other": "small"}
    assert set(uniform(sizes, costs)) == {"small"}


def test_what_cannot_fit_is_refused_with_the_least_size():
    costs, sizes = as_tables([((10, 3.0), (20, 2.0), (30, 1.0))] * 2)
    with pytest.raises(UserError, match="take 20 bytes at least, not 19"):
        cheapest(costs, sizes, 19)


def test_a_choice_is_never_worse_than_one_option_for_all_of_the_same_size():
    drawn = random.Random(0)
    layers = []
    for _ in range(300):
        weight, sensitivity = drawn.randint(1 << 14, 1 << 20), 10 ** drawn.uniform(-6, -2)
        layers.append(tuple((weight * bits // 8, sensitivity * 4.0**-bits) for bits in (3, 4, 6)))
    costs, sizes = as_tables(layers)
    alike = uniform(sizes, costs)["middle"]
    found = cheapest(costs, sizes, alike.bytes)
    assert found.bytes <= alike.bytes
    assert found.cost < 0.8 * alike.cost
