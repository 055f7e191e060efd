"""First-order contributions of layers to what a sampler ends in, against the change itself."""

import torch
from torch import nn

from dmquant.calib.choice.contributions import watching

STEPS, PROMPTS = 4, 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(6, 8), nn.Conv2d(2, 2, 3, padding=1), nn.Linear(8, 6)

    def forward(self, x, timestep):
        hidden = torch.tanh(self.first(x) + timestep)
        image = self.conv(hidden.view(-1, 2, 2, 2))
        return self.last(hidden + image.flatten(1))


def sample(net, start):
    """A sampler with guidance: rows without and with the prompt, one branch behind the other."""
    z = start
    for step in range(STEPS):
        one, other = net(torch.cat([z, z + 0.1]), 0.2 * step).chunk(2)
        z = z - 0.3 * (one + 2 * (other - one))
    return z


def test_contributions_are_the_derivative_by_the_change_and_steps_add_up():
    torch.manual_seed(0)
    net = Net().double().requires_grad_(False)
    start, noise = torch.randn(PROMPTS, 6).double(), torch.randn(PROMPTS, 6).double()
    moves = {name: 1e-6 * torch.randn_like(net.get_submodule(name).weight) for name in ("first", "conv", "last")}

    def change(name):
        layer, move = net.get_submodule(name), moves[name]
        if isinstance(layer, nn.Linear):
            return lambda x: nn.functional.linear(x, move)
        return lambda x: layer._conv_forward(x, move, None)

    changes = {name: {"weights": change(name)} for name in moves}
    changes["first"]["inputs"] = lambda x: nn.functional.linear(1e-6 * x.square(), net.first.weight)
    with watching(net, changes, STEPS, PROMPTS) as found, torch.enable_grad():
        (sample(net, start) * noise).sum().backward()
    exact = sample(net, start)
    for name, move in moves.items():
        layer = net.get_submodule(name)
        layer.weight.data += move
        moved = ((sample(net, start) - exact) * noise).sum(1)
        layer.weight.data -= move
        told = found.of[name, "weights"]
        assert told.shape == (STEPS, PROMPTS)
        assert torch.allclose(told.sum(0), moved, rtol=1e-4)
        assert torch.allclose(found.total(name, "weights"), moved.square(), rtol=1e-3)
        assert torch.equal(found.by_step(name, "weights"), told.square())
    before = net.first.forward
    net.first.forward = lambda x: before(x + 1e-6 * x.square())
    moved = ((sample(net, start) - exact) * noise).sum(1)
    assert torch.allclose(found.of["first", "inputs"].sum(0), moved, rtol=1e-4)


def test_nothing_stays_changed():
    net = Net().requires_grad_(False)
    with watching(net, {"first": {"weights": lambda x: net.first(x)}}, STEPS, PROMPTS):
        pass
    assert "forward" not in vars(net)
    assert "forward" not in vars(net.first)
