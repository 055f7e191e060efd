"""Which blocks of a backbone are on its device: all, or for a device that is too small those alone that compute."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

HOST = torch.device("cpu")


class Resident:
    """Places the blocks of a backbone in host memory; what is in none of them is on the device all the time.

    So is the block with the backbone's first parameter, if one has it: that is by what others find the device.

    Args:
        device: where blocks compute; None leaves all as it is.
        blocks: names of the modules that are placed, none in another.
    """

    def __init__(self, backbone: nn.Module, blocks: Iterable[str], device: torch.device | None):
        first = next(backbone.parameters())
        self.backbone, self.device = backbone, first.device if device is None else device
        modules = {} if device is None else {name: backbone.get_submodule(name) for name in blocks}
        self._blocks = {
            name: block for name, block in modules.items() if all(each is not first for each in block.parameters())
        }
        for block in self._blocks.values():
            move(block, HOST)
        if self._blocks:
            self._place_rest(self.device)
        elif device is not None:
            move(backbone, device)

    @contextlib.contextmanager
    def only(self, names: Iterable[str]) -> Iterator[None]:
        """These of the blocks are on the device until the block ends."""
        blocks = [self._blocks[name] for name in names if name in self._blocks]
        try:
            for block in blocks:
                move(block, self.device)
            yield
        finally:
            for block in blocks:
                move(block, HOST)

    @contextlib.contextmanager
    def as_called(self) -> Iterator[None]:
        """Every block is on the device from when it is called until another one is, until the block ends."""
        there: list[nn.Module] = []

        def enter(block: nn.Module, args: tuple) -> None:
            if there != [block]:
                leave()
                move(block, self.device)
                there.append(block)

        def leave() -> None:
            while there:
                move(there.pop(), HOST)

        with contextlib.ExitStack() as stack:
            stack.callback(leave)
            for block in self._blocks.values():
                stack.callback(block.register_forward_pre_hook(enter).remove)
            yield

    @contextlib.contextmanager
    def in_host_memory(self) -> Iterator[None]:
        """All of a backbone whose blocks are placed is in host memory until the block ends."""
        if self._blocks:
            self._place_rest(HOST)
        yield
        if self._blocks:
            self._place_rest(self.device)

    def end(self) -> None:
        """Put all of the backbone on the device."""
        for block in self._blocks.values():
            move(block, self.device)

    def _place_rest(self, device: torch.device) -> None:
        inside = {id(module) for block in self._blocks.values() for module in block.modules()}
        for module in self.backbone.modules():
            if id(module) not in inside:
                module._apply(lambda tensor: tensor.to(device), recurse=False)


def move(module: nn.Module, device: torch.device) -> None:
    """Put all tensors of a module on a device."""
    module.to(device)
