"""A training loop whose budget is time, with checkpoints that it resumes from."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

WARMUP_STEPS = 100
CHECKPOINT_SECONDS = 60
LOG_SECONDS = 20


class Training:
    """Trains `modules` until their minutes are spent, then leaves the running average in their parameters.

    A checkpoint of the same name in `folder` is resumed. All randomness must come from torch's CPU generator, which
    the checkpoint holds.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, torch.nn.Module],
        optimizers: list[torch.optim.Optimizer],
        minutes: float,
        decay: float,
        folder: Path,
    ):
        self.name, self.modules, self.optimizers = name, torch.nn.ModuleDict(modules), optimizers
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.rates = [group["lr"] for group in self.groups]
        self.budget, self.decay, self.file = 60 * minutes, decay, folder / f"{name}.pt"
        self.parameters = list(self.modules.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.steps, self.seconds = 0, 0.0
        if self.file.exists():
            self._resume()

    def run(self, loss_of_batch: Callable[[], Tensor], schedule: Callable[[float], float]) -> None:
        """`schedule` maps the share of the budget spent to a factor on the learning rates."""
        logged = saved = self.seconds
        before = time.monotonic()
        while self.seconds < self.budget:
            loss = self._step(loss_of_batch, schedule(self.seconds / self.budget))
            now = time.monotonic()
            self.seconds, before = self.seconds + now - before, now
            if self.seconds - logged > LOG_SECONDS:
                logged = self.seconds
                left = (self.budget - self.seconds) / 60
                print(f"{self.name}: step {self.steps}, loss {loss:.4f}, {left:.1f} min left", flush=True)
            if self.seconds - saved > CHECKPOINT_SECONDS or self.seconds >= self.budget:
                saved = self.seconds
                self._save()
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            parameter.data.copy_(mean)
        self.modules.eval()

    def _step(self, loss_of_batch: Callable[[], Tensor], factor: float) -> float:
        factor *= min(1, (self.steps + 1) / WARMUP_STEPS)
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)
        return loss.item()

    def _save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        state = {
            "modules": self.modules.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "steps": self.steps,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        torch.save(state, part)
        part.replace(self.file)

    def _resume(self) -> None:
        state = torch.load(self.file, map_location=self.average[0].device, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch._foreach_copy_(self.average, state["average"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        torch.set_rng_state(state["random"].cpu())
        print(f"{self.name}: resumed at step {self.steps}, {self.seconds / 60:.1f} minutes spent", flush=True)

    def facts(self) -> dict[str, float]:
        return {"steps": self.steps, "minutes": round(self.seconds / 60, 2)}


def cosine(spent: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * spent)) + 0.01


def hold_then_fall(spent: float) -> float:
    return min(1.0, max(0.01, 2 * (1 - spent)))
