"""Pieces of work side by side: in processes of this machine, or on a Ray cluster.

An engine takes a function of this package, items that can be pickled, and a crew; it yields each item with what the
function returned, in the order in which they end, or with a UserError where the process that did it died.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from dmquant.errors import UsageError, UserError, unknown

Item, Result = TypeVar("Item"), TypeVar("Result")
Work = Callable[[Item], Result]
Outcomes = Iterator[tuple[Item, Result | UserError]]


@dataclass(frozen=True)
class Crew:
    """The number of processes that work at once, of threads for each, and of GPUs to spread them over."""

    workers: int
    threads: int
    gpus: int = 0

    @classmethod
    def of(cls, workers: int | None, threads: int | None, device: str) -> "Crew":
        """By default one worker a GPU where `device` leaves open which, one on a CPU; threads are shared out."""
        gpus = torch.cuda.device_count() if device == "cuda" else 0
        workers = workers or gpus or 1
        return cls(workers, threads or max(1, torch.get_num_threads() // workers), gpus)


def local(work: Work, items: Sequence[Item], crew: Crew) -> Outcomes:
    """In processes of this machine, which end with this one however it ends.

    Each is a pool of its own, so that one that dies takes no work of the others with it.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()

    def pool(number: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, context, _begin, (number, crew, theirs))

    waiting = deque(items)
    idle = {number: pool(number) for number in range(min(crew.workers, len(waiting)))}
    running: dict[Future, tuple[int, ProcessPoolExecutor, Item]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                number, free = idle.popitem()
                item = waiting.popleft()
                running[free.submit(work, item)] = number, free, item
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, used, item = running.pop(future)
                result, alive = _outcome(future)
                if not alive:
                    used.shutdown()
                idle[number] = used if alive else pool(number)
                yield item, result
    finally:
        if running:
            ours.close()  # whoever still works is not waited for
        for each in (*idle.values(), *(used for _, used, _ in running.values())):
            each.shutdown()
        ours.close()
        theirs.close()


def _outcome(future: Future) -> tuple[Result | UserError, bool]:
    """The result of a process, and whether it is alive."""
    try:
        return future.result(), True
    except BrokenProcessPool:
        return UserError("its process died; the system may have run out of memory: fewer --workers need less"), False


def _begin(number: int, crew: Crew, lifeline: Connection) -> None:
    """Set up worker `number`; it ends when the other end of `lifeline` is closed, or gone with its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one decides
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(crew.threads)
    if crew.gpus:
        torch.cuda.set_device(number % crew.gpus)


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


def on_ray(work: Work, items: Sequence[Item], crew: Crew) -> Outcomes:
    """On the Ray cluster that this machine belongs to or RAY_ADDRESS names, else on a Ray started here.

    All machines of it must see the folders of the items under the same paths.
    """
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    needs = {"num_cpus": crew.threads, "num_gpus": 1 if crew.gpus else 0, "max_retries": 0}
    remote = ray.remote(**needs)(_with_threads)
    waiting, running = deque(items), {}
    try:
        while waiting or running:
            while waiting and len(running) < crew.workers:
                item = waiting.popleft()
                running[remote.remote(work, item, crew.threads)] = item
            done, _ = ray.wait(list(running))
            for reference in done:
                item = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    result = UserError(f"Ray could not finish it: {str(error).strip().splitlines()[0]}")
                yield item, result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _with_threads(work: Work, item: Item, threads: int) -> Result:
    torch.set_num_threads(threads)
    return work(item)


ENGINES: dict[str, Callable[[Work, Sequence[Item], Crew], Outcomes]] = {"local": local, "ray": on_ray}


def check_engine(name: str) -> None:
    """UsageError for an unknown engine, UserError for one that is not installed."""
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES, f"the engines are {', '.join(ENGINES)}")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs the package ray: pip install 'dmquant[ray]', or leave --engine out")


def check_alone(processes: int) -> None:
    """UsageError under a launcher: a sweep starts its own processes."""
    if processes > 1:
        raise UsageError("a sweep starts its own processes: run it without a launcher, with --workers")
