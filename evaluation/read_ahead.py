"""Items prepared by threads while the batches before them are in use."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

READERS = 4  # threads that read and prepare images while the network works
BATCHES_AHEAD = 2

Item, Result = TypeVar("Item"), TypeVar("Result")


def read_ahead(
    batches: Iterable[Iterable[Item]], prepare: Callable[[Item], Result], pool: ThreadPoolExecutor
) -> Iterator[list[Result]]:
    """`prepare` of the items of every batch, in order, up to BATCHES_AHEAD batches ahead; errors are its own."""
    waiting: deque[list[Future[Result]]] = deque()
    for batch in batches:
        waiting.append([pool.submit(prepare, item) for item in batch])
        if len(waiting) > BATCHES_AHEAD:
            yield [item.result() for item in waiting.popleft()]
    while waiting:
        yield [item.result() for item in waiting.popleft()]
