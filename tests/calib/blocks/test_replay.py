"""Replay: from the middle of a backbone the same bits come out, and who needs which output is found out."""

import contextlib

import pytest
import torch
from torch import nn

from dmquant.calib.blocks.replay import replaced_forward, replay, replay_on
from dmquant.calib.blocks.trace import trace
from dmquant.calib.blocks.units import find_blocks
from dmquant.calib.data.tree import flatten, in_own_containers, map_floats
from dmquant.convert import plan
from dmquant.diffusers.families import families
from dmquant.errors import UserError
from tests.calib.runs import captured, recipe_of
from tests.tiny import TINY, marked
from tests.tiny.imaged import IMAGED


@pytest.fixture(scope="module", params=[*marked(), *marked(IMAGED)])
def case(request, tmp_path_factory):
    """Model, backbone, arguments of three samples, and the blocks as a recipe that keeps nothing has them."""
    backbone, names, store = captured(request.param, tmp_path_factory.mktemp(request.param))
    chosen = [0, 5, 9] if len(store) > 9 else [0, len(store) // 2, len(store) - 1]  # fewer of a part of the steps
    arguments = store.batch(chosen)
    return request.param, backbone, arguments, blocks_of(backbone, names, arguments, recipe_of(keep=False))


def blocks_of(backbone, names, arguments, recipe):
    layers = [step.name for step in plan(backbone, recipe)]
    return find_blocks(names, layers, lambda names: trace(backbone, arguments, names))


def outputs_of(backbone, arguments, names):
    """What each module gives in one whole forward pass."""
    outputs, handles = {}, []

    def keep(name):
        return lambda module, args, output: outputs.update({name: output})

    for name in names:
        handles.append(backbone.get_submodule(name).register_forward_hook(keep(name)))
    with torch.no_grad():
        passed(backbone, arguments)
    for handle in handles:
        handle.remove()
    return outputs


def passed(backbone, arguments):
    args, kwargs = in_own_containers(arguments)
    return backbone(*args, **kwargs)


def equal(one, other):
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(flatten(one)[1], flatten(other)[1], strict=True))


def test_a_replay_gives_the_bits_of_the_whole_forward(case):
    _, backbone, arguments, blocks = case
    whole = outputs_of(backbone, arguments, [block.name for block in blocks])
    assert len(blocks) > 4
    for number, block in enumerate(blocks):
        given = {other.name: whole[other.name] for other in blocks[:number]}
        with torch.no_grad():
            assert equal(replay(backbone, arguments, given, block.name), whole[block.name])


def test_going_on_from_the_middle_ends_in_the_bits_of_the_backbone(case):
    _, backbone, arguments, blocks = case
    whole = outputs_of(backbone, arguments, [block.name for block in blocks])
    with torch.no_grad():
        returned = passed(backbone, arguments)[0]
        for number in (0, len(blocks) // 2, len(blocks) - 1):
            given, through = {other.name: whole[other.name] for other in blocks[:number]}, blocks[number].name
            output, found = replay_on(
                backbone, arguments, given, through, lambda output: map_floats(torch.clone, output)
            )
            assert equal(output, whole[through])
            assert torch.equal(found[0], returned)
        poisoned = replay_on(backbone, arguments, {}, blocks[0].name, lambda output: map_floats(nan_like, output))
    assert poisoned[1][0].isnan().any()


def test_block_by_block_with_only_what_is_still_needed_ends_in_the_bits_of_the_backbone(case):
    model, backbone, arguments, _ = case
    family = families()[(TINY | IMAGED)[model].family]
    blocks = blocks_of(backbone, family.blocks(backbone), arguments, recipe_of(keep=False).keeping(family.keep))
    computed, needed = {}, {}
    for number, block in enumerate(blocks):
        with torch.no_grad():
            computed[block.name] = needed[block.name] = replay(backbone, arguments, needed, block.name)
        for other in blocks[: number + 1]:
            if other.last_use <= number:
                needed[other.name] = map_floats(nan_like, computed[other.name])
    with contextlib.ExitStack() as stack, torch.no_grad():
        whole = passed(backbone, arguments)[0]
        for name, output in computed.items():
            stack.enter_context(replaced_forward(backbone.get_submodule(name), lambda *_, output=output, **__: output))
        assert torch.equal(passed(backbone, arguments)[0], whole)


def nan_like(tensor):
    return torch.full_like(tensor, torch.nan)


def test_outputs_past_their_last_use_do_not_matter_and_others_do(case):
    _, backbone, arguments, blocks = case
    whole = outputs_of(backbone, arguments, [block.name for block in blocks])

    def at(number, poisoned):
        given = {block.name: whole[block.name] for block in blocks[:number]}
        for block in poisoned:
            given[block.name] = map_floats(nan_like, whole[block.name])
        with torch.no_grad():
            return replay(backbone, arguments, given, blocks[number].name)

    for number, block in enumerate(blocks):
        dead = [other for other in blocks[:number] if other.last_use < number]
        assert equal(at(number, dead), whole[block.name])
    for block in blocks:
        if block.last_use > blocks.index(block):
            assert not equal(at(block.last_use, [block]), whole[blocks[block.last_use].name])


def test_the_order_is_that_of_the_forward_pass_and_every_layer_belongs_to_one_block(case):
    _, backbone, arguments, blocks = case
    called = list(outputs_of(backbone, arguments, [block.name for block in blocks]))
    assert [block.name for block in blocks] == called
    layers = [layer for block in blocks for layer in block.layers]
    assert len(layers) == len(set(layers))
    assert all(block.layers == (block.name,) for block in blocks if block.is_layer)
    assert all(block.saved_bytes > 0 for block in blocks)


LAST_USES = {
    "pixart-sigma": {f"transformer_blocks.{n}": f"transformer_blocks.{n + 1}" for n in range(2)}
    | {"transformer_blocks.2": "proj_out", "pos_embed.proj": "transformer_blocks.0"},
    "sd15": {  # each skip connection until its resnet on the way up
        "conv_in": "up_blocks.1.resnets.1",
        "down_blocks.0.resnets.0": "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.0": "up_blocks.1.resnets.0",
        "down_blocks.0.downsamplers.0": "up_blocks.0.resnets.1",
        "down_blocks.1.resnets.0": "up_blocks.0.resnets.0",
        "mid_block.resnets.0": "mid_block.attentions.0",
        "mid_block.attentions.0": "mid_block.resnets.1",
        "mid_block.resnets.1": "up_blocks.0.resnets.0",
        "up_blocks.0.resnets.0": "up_blocks.0.resnets.1",
        "up_blocks.0.resnets.1": "up_blocks.0.upsamplers.0",
        "up_blocks.0.upsamplers.0": "up_blocks.1.resnets.0",
        "up_blocks.1.attentions.1": "conv_out",
    },
    "sdxl": {  # the residual around a transformer goes on as the skip connection
        "down_blocks.0.resnets.0": "up_blocks.1.resnets.0",
        "down_blocks.0.attentions.0.transformer_blocks.0": "down_blocks.0.attentions.0.transformer_blocks.1",
        "down_blocks.0.attentions.0.transformer_blocks.1": "down_blocks.0.attentions.0.proj_out",
        "down_blocks.0.downsamplers.0": "up_blocks.0.resnets.1",
    },
    "hunyuan-1.2": {  # long skips: first in, last out
        "blocks.0": "blocks.5",
        "blocks.1": "blocks.4",
        "blocks.2": "blocks.3",
        "blocks.3": "blocks.4",
    },
    "sd3": {f"transformer_blocks.{n}": f"transformer_blocks.{n + 1}" for n in range(2)},
    "flux": {
        "transformer_blocks.1": "single_transformer_blocks.0",
        "single_transformer_blocks.0": "single_transformer_blocks.1",
        "single_transformer_blocks.1": "proj_out",
    },
}
LAST_USES["hunyuan-1.1"] = LAST_USES["hunyuan-1.2"]


def test_outputs_are_needed_as_long_as_the_architecture_says(case):
    model, _, _, blocks = case
    last_uses, expected = {block.name: blocks[block.last_use].name for block in blocks}, LAST_USES.get(model, {})
    assert {name: last_uses[name] for name in expected} == expected
    assert blocks[-1].last_use == len(blocks) - 1


def test_a_size_that_does_not_halve_evenly_reaches_the_upsamplers(tmp_path):
    backbone, names, store = captured("sd15", tmp_path)
    positional, keywords = store.batch([0])
    arguments = positional, keywords | {"sample": keywords["sample"][..., :15, :13]}
    blocks = trace(backbone, arguments, names)
    assert {block.name: block.output.shape for block in blocks if "upsamplers" in block.name} == {
        "up_blocks.0.upsamplers.0": (2, 64, 15, 13)
    }


def test_gradients_flow_from_what_is_computed(case):
    _, backbone, arguments, blocks = case
    number, block = next((n, block) for n, block in enumerate(blocks) if not block.is_layer)
    whole = outputs_of(backbone, arguments, [other.name for other in blocks[:number]])
    parameter = backbone.get_submodule(block.layers[0]).weight
    output = replay(backbone, arguments, whole, block.name)
    loss = sum(leaf.square().mean() for _, leaf in flatten(output)[1])
    (gradient,) = torch.autograd.grad(loss, [parameter])
    assert gradient.abs().max() > 0


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_a_module_that_runs_twice_is_refused_and_one_that_never_runs_left_out():
    model, arguments = Twice(), ((torch.randn(2, 4),), {})
    with pytest.raises(UserError, match="layer runs more than once"):
        trace(model, arguments, ["layer"])
    assert trace(model, arguments, ["idle"]) == []
    with pytest.raises(UserError, match="idle was not reached"):
        replay(model, arguments, {}, "idle")
    assert "forward" not in vars(model.layer) | vars(model.idle)


def test_a_forward_is_put_back_even_where_one_was_set_before():
    model, x = nn.Linear(2, 2), torch.randn(1, 2)
    with replaced_forward(model, lambda x: x + 1):
        with replaced_forward(model, lambda x: x + 2):
            assert torch.equal(model(x), x + 2)
        assert torch.equal(model(x), x + 1)
    assert "forward" not in vars(model)
    with pytest.raises(ZeroDivisionError), replaced_forward(model, lambda x: 1 // 0):
        model(x)
    assert "forward" not in vars(model)
