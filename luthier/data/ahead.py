"""Reading ahead: an iterator whose items are computed by a background thread before they are asked for.

What it yields does not depend on it; only the waiting does. Used by `loader.py` for steps and by
`streaming.py` for buffers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class _End(Exception):
    """The items are at their end."""


def ahead(items: Generator[T], number: int) -> Generator[T]:
    """`items`, at most `number` of them waiting. Their exceptions are raised here, in their place; when
    this is closed, the thread ends and `items` is closed."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(number)
    stop = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if stop.is_set():
                    break
            items.close()
            put(None, _End())
        except BaseException as error:  # whatever it is, the consumer must see it
            put(None, error)

    thread = threading.Thread(target=work, name="luthier-data", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, _End):
                return
            if error is not None:
                raise error
            yield item  # pyright: ignore[reportReturnType]
    finally:
        stop.set()
        while thread.is_alive():
            with suppress(queue.Empty):
                ready.get_nowait()  # room for an item that it waits to put
            thread.join(0.002)
