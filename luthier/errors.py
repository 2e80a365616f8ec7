"""The errors a user may meet. Each says what was asked, what was found and what to do.

`Refused` is raised before any work and before anything is written (exit code 2). `Failed` is raised
while running (exit code 1). The command line prints the message alone; `--debug` adds the traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

FOREIGN = (
    "PaddleNLP "  # how the origin of a key begins that was written as an argument of that suite
)


class LuthierError(Exception):
    """Base of every error with a message made for the user."""

    exit_code = 1

    def __init__(self, asked: str, found: str = "", do: str = "") -> None:
        self.asked, self.found, self.do = asked, found, do
        super().__init__(" ".join(_sentence(part) for part in (asked, found, do) if part))

    def add(self, do: str) -> None:
        """Something more that the user should know or do."""
        self.__init__(self.asked, self.found, f"{self.do}; {do}" if self.do else do)


class Refused(LuthierError):
    """Bad input or an impossible combination; nothing was written."""

    exit_code = 2


class Failed(LuthierError):
    """The run could not go on; what was saved before is intact."""

    exit_code = 1


class NotFinite(Failed):
    """NaN or infinity in a step: begun again from the same place, the run comes to the same."""


class Unwritten(Failed):
    """A file could not be written; what was there before is untouched."""


class LostPeer(Failed):
    """Another process of the run is gone: it has the reason, not this one."""


class Stopped(LuthierError):
    """A signal stopped the run after its state was saved."""

    def __init__(self, signal_number: int, asked: str, found: str = "", do: str = "") -> None:
        super().__init__(asked, found, do)
        self.exit_code = 128 + signal_number


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?", ":", "\n")) else text + "."


def suggest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'rank'?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f"did you mean '{near[0]}'?" if near else ""


@contextmanager
def traced(origins: Mapping[str, str]) -> Iterator[None]:
    """A refusal inside that is about keys of ours says which arguments of another suite's file they come from.

    `origins`: where each given key stands (`configfile.Resolved`).
    """
    try:
        yield
    except Refused as error:
        asked = set(re.findall(r"[a-z_]+\.[a-z_]+", error.asked))
        told = (f"{key} comes from {origin}" for key, origin in origins.items() if key in asked)
        if found := "; ".join(text for text in told if f"from {FOREIGN}" in text):
            error.add(found)
        raise


def need(package: str, extra: str, why: str) -> Refused:
    """The error for an optional package that is missing."""
    return Refused(
        f"{why} needs the package '{package}'",
        "it is not installed",
        f"pip install 'luthier[{extra}]'",
    )
