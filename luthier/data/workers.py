"""Processes that tokenise: order kept, memory bounded, results independent of their number.

They are forked where the platform can (nothing is imported twice, and a user's script needs no main
guard), touch no model and no GPU, ignore the signals that the run itself answers, and end when their
parent does, however it ends. What they compute is `dataset.Encoder`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from luthier.errors import Failed

CHUNK_ROWS = 64  # rows per task; has no influence on any result
AHEAD = 2  # tasks per process that may wait for being fetched

Chunk = Iterable[int]
Encode = Callable[[Chunk], Any]

_encode: Encode | None = None  # in a worker process: what it does


class Workers:
    """`number` processes that run `encode` on chunks of row indices; 0 = this process does it itself."""

    def __init__(self, encode: Encode, number: int) -> None:
        self.encode_here, self.number = encode, number
        self._pool = _start(encode, number) if number else None

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[Any]:
        """`encode(chunk)` of each chunk, in order. Reads at most a few chunks ahead."""
        if self._pool is None:
            yield from map(self.encode_here, chunks)
            return
        waiting: deque[Future[Any]] = deque()
        try:
            for chunk in chunks:
                waiting.append(self._pool.submit(_work, chunk))
                if len(waiting) >= AHEAD * self.number:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise Failed(
                f"tokenising in {self.number} processes (data.workers)",
                "one of them was killed, as happens when memory runs out",
                "set data.workers=0 or a smaller number",
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the processes. Results that were not fetched are lost."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start(encode: Encode, number: int) -> ProcessPoolExecutor:
    # forking is unsafe only beside threads that hold locks the child needs; the child here uses numpy and
    # the tokenizer, whose own threads are switched off in it
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(number, context, initializer=_begin, initargs=(encode, os.getpid()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        pool.submit(os.getpid).result()  # all processes start now, not at the first chunk
    return pool


def _begin(encode: Encode, parent: int) -> None:
    global _encode
    _encode = encode
    gc.freeze()  # what was forked is not looked through, nor its memory copied, for garbage
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process when its parent is gone: a killed parent cannot say so, and the pipe to it stays
    open in the other workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(chunk: Chunk) -> Any:
    assert _encode is not None
    return _encode(chunk)
