"""What layers share while a block is run, and what they do not."""

import pytest
import torch
from torch import nn

from dmquant.activations import ActivationSpec
from dmquant.calib.blocks.once import Latest, kind_of_input, sharing_inputs
from dmquant.layers import quantize_layer
from dmquant.qtensor import WeightSpec
from tests.calib.blocks.test_learn import COLUMNS, iid, problem


def layer_of(activations="fp6", seed=0):
    torch.manual_seed(seed)
    return quantize_layer(nn.Linear(64, 8), WeightSpec.parse("fp4"), ActivationSpec.parse(activations, "group:16"))


def test_an_input_is_worked_on_again_once_it_is_another_or_was_written_into():
    latest, made = Latest(), []
    x, y = torch.zeros(3), torch.zeros(3)

    def make(tensor):
        made.append(tensor)
        return tensor + 1

    for given, kind, count in ((x, 0, 1), (x, 0, 1), (y, 0, 2), (x, 0, 3), (x, 1, 4), (x, 0, 4)):
        assert torch.equal(latest.of(kind, given, make), given + 1)
        assert len(made) == count
    x += 5
    assert torch.equal(latest.of(0, x, make), torch.full((3,), 6.0))
    assert len(made) == 5


def test_layers_that_quantize_alike_share_and_others_do_not():
    one, same, other = layer_of(), layer_of(seed=1), layer_of("int6")
    assert kind_of_input(one, "a") == kind_of_input(same, "b")
    assert kind_of_input(one, "a") != kind_of_input(other, "b")
    convolution = quantize_layer(nn.Conv2d(8, 8, 3), WeightSpec.parse("fp4"), ActivationSpec.parse("fp6", "group:16"))
    assert kind_of_input(convolution, "conv") == "conv"


@pytest.mark.parametrize("fails", [False, True])
def test_layers_give_what_they_give_alone_and_are_as_they_were_afterwards(fails):
    layers = [layer_of(), layer_of(seed=1), layer_of("int6", 2)]
    inputs = [torch.randn(5, 64) for _ in range(2)]
    expected = [layer(x) for x in inputs for layer in layers]
    try:
        with sharing_inputs(layers):
            assert all(map(torch.equal, expected, [layer(x) for x in inputs for layer in layers]))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    layers[0].qweight.zero_()
    assert torch.equal(layers[0](inputs[0]), layers[0].bias.expand(5, -1))


def test_layers_that_learn_share_an_input_and_its_gradient_is_that_of_both():
    learners = [problem(iid, activations=ActivationSpec.parse("fp6", "token"))[0] for _ in range(2)]
    x, counted = torch.randn(3, 5, COLUMNS), []
    given = x.clone().requires_grad_()
    sum(learner.forward(given).square().sum() for learner in learners).backward()
    shared = x.clone().requires_grad_()
    for learner in learners:
        quantize = learner.quantized.quantize_input
        learner.quantized.quantize_input = lambda x, quantize=quantize: counted.append(1) or quantize(x)
    with sharing_inputs(learners):
        sum(learner.forward(shared).square().sum() for learner in learners).backward()
    assert len(counted) == 1
    assert torch.allclose(shared.grad, given.grad, rtol=1e-5, atol=1e-6)
    assert "quantize_input" not in vars(learners[0])
