"""Several processes doing one command together, as `accelerate launch -m dmquant` or torchrun starts them.

Every process runs the same code in the same order; this module is how they divide work and stay in step. Only small
Python objects travel between them, over gloo; images, features and shards go through the run folder, so processes on
several machines need a folder that all of them see.
"""

import contextlib
import functools
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from dmquant.errors import UserError

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=30)  # calibration on the main process takes hours while the others wait
GRACE = 10.0  # seconds in which the launcher ends the processes that another's failure stops


@dataclass(frozen=True)
class Processes:
    """The processes of one command as one of them sees it: it is `rank` of `count`, `local_rank` on its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that talks, decides and keeps the records."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The share of `items` of this process: every item belongs to exactly one process."""
        return list(items[self.rank :: self.count])

    def gather(self, item: T) -> list[T]:
        """All-gather: the values that the processes passed, by rank; every process waits for the list.

        Raises the UserError that a process failed with meanwhile (see `together`).
        """
        if self.count == 1:
            return [item]
        items = _exchange(item, self.count)
        items[self.rank] = item
        failures = [each.error for each in items if isinstance(each, _Failure)]
        if failures:
            failures[0].is_known_to_all = True
            raise failures[0]
        return items

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.gather(None)

    def together(self, work: Callable[[], T]) -> list[T]:
        """The result of `work` in each process, by rank; where it raises a UserError in one, all raise that.

        A process that fails tells it at the next `gather` of the others, whichever that is, so all are in step again
        when they catch it.
        """
        try:
            result = work()
        except UserError as error:
            if self.count > 1 and not getattr(error, "is_known_to_all", False):
                self.gather(_Failure(error))
            raise
        return self.gather(result)

    def on_main(self, work: Callable[[], T]) -> T:
        """The result of `work`, which the main process does alone while the others wait for it, or its UserError."""
        return self.together((lambda: _alone(work)) if self.is_main else lambda: None)[0]


@dataclass(frozen=True)
class _Failure:
    """Takes the place of what a process would have passed to `gather`."""

    error: UserError


_current = Processes()


def current() -> Processes:
    """The processes of this command; one alone unless the block of a `joined` of several is being executed.

    A program of someone else's that was started as several processes stays what it is: each uses dmquant alone.
    """
    return _current


def _alone(work: Callable[[], T]) -> T:
    """The result of `work`, done as if there were no other processes: they would not answer."""
    global _current
    everyone, _current = _current, Processes()
    try:
        return work()
    finally:
        _current = everyone


def started(environment: Mapping[str, str] = os.environ) -> Processes:
    """The processes that a launcher says it started, by the variables that torchrun and accelerate set."""
    if "RANK" not in environment or int(environment.get("WORLD_SIZE", 1)) == 1:
        return Processes()
    return Processes(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Make the block one command of all the processes that were started; without a launcher it changes nothing.

    Only the main process prints. Where another fails alone, it says so after the main one had time to say the same.
    """
    global _current
    _current = started()
    try:
        if _current.is_main:
            yield _current
        else:
            with _speaking_only_of_own_failure(_current):
                yield _current
    finally:
        _current = Processes()
        _leave_group()


@contextlib.contextmanager
def _speaking_only_of_own_failure(processes: Processes) -> Iterator[None]:
    """Hold back standard error of the block; print it only if the block failed and this process lives a while longer.

    A main process that fails too has the launcher end this one meanwhile.
    """
    said = io.StringIO()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(said):
        try:
            yield
            return
        except SystemExit as end:
            if end.code in (None, 0):
                raise
            failed = end
    time.sleep(GRACE)
    for line in said.getvalue().splitlines():
        print(f"process {processes.rank} of {processes.count}: {line}", file=sys.stderr, flush=True)
    raise failed


def _exchange(item: Any, count: int) -> list[Any]:
    import torch.distributed as dist

    group, items = _group(), [None] * count
    try:
        dist.all_gather_object(items, item, group)
    except RuntimeError:  # gloo found a connection closed
        _end_silently()
    return items


@functools.cache
def _group() -> Any:
    """A gloo group of all processes: what is exchanged lies in ordinary memory, whatever the device."""
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    return dist.group.WORLD


def _leave_group() -> None:
    """End gloo's threads: Python would end the process with an abort where they are still there at its exit."""
    if _group.cache_info().currsize:
        import torch.distributed as dist

        _group.cache_clear()
        dist.destroy_process_group()


def _end_silently() -> NoReturn:
    """End after another process did, which has said why, or whose end the launcher reports: it is about to end all."""
    time.sleep(2 * GRACE)
    raise SystemExit(1)
