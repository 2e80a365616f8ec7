"""A tokenizer as the renderer needs it: ids of pieces of text, never a special token by itself.

Only `Tokens.prefix` and `Tokens.suffix` say which special tokens belong around a plain prompt; the
templates put them there, once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from luthier.data.truncation import Ids
from luthier.errors import Refused

PROBE = "a"


def has_own_prompts(tokenizer: Any) -> bool:
    """Whether it is one of those that `infilling.OwnPrompts` describes."""
    return hasattr(tokenizer, "special_ids_around")


class Tokens:
    """`tokenizer` is a transformers tokenizer; `prefix`, `suffix` the special ids it puts around a text
    (a closing EOS is left out of `suffix`: an answer follows); `eos`, `bos`, and `end`, which ends an
    answer, are ids or None; `stops` are all that may end one. `opening` are the ids before a text that is learnt as a whole; `trained_before`
    is how many tokens before an answer are trained with it (see `infilling.py`)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        bare = self(PROBE)
        full = list(tokenizer(PROBE, verbose=False)["input_ids"])
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        start = starts[-1] if starts else len(full)
        self.prefix: Ids = full[:start]
        self.suffix: Ids = [i for i in full[start + len(bare) :] if i != self.eos]
        self.end, self.opening, self.trained_before = self.eos, self.prefix, 0
        self.stops: tuple[int | None, ...] = (self.end,)
        if has_own_prompts(tokenizer):
            before, behind = tokenizer.special_ids_around([])
            self.stops = tuple(tokenizer.stop_ids)
            self.end, self.opening = tokenizer.stop_ids[0], [*before, *behind]
            self.trained_before = tokenizer.trained_before
        newline = self("\n")
        # SentencePiece tokenizers put a blank before a text; inside a rendered conversation it is wrong
        self._newline = newline if self("\n" + PROBE)[len(newline) :] != bare else None

    def __call__(self, text: str) -> Ids:
        """Ids of a text that stands alone, without special tokens of its own."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def ended(self, text: str) -> Ids:
        """Ids of an answer or document, ending in exactly one end token."""
        ids = self(text)
        return ids if self.end is None or ids[-1:] == [self.end] else [*ids, self.end]

    def after(self, text: str) -> Ids:
        """Ids of a text that goes on from an earlier piece."""
        if self._newline is None or not text:
            return self(text)
        ids = self("\n" + text)
        size = len(self._newline)
        return ids[size:] if ids[:size] == self._newline else self(text)

    def turn_marks(self) -> Callable[[Ids], list[bool]]:
        """A function that marks the tokens of ids which open and close ChatML's messages, and the line ends behind
        them. Refused: a tokenizer without these tokens."""
        names = ("<|im_start|>", "<|im_end|>")
        vocab = self.tokenizer.get_vocab()
        opened, closed = (vocab.get(name) for name in names)
        line = self("\n")
        if opened is None or closed is None or len(line) != 1 or has_own_prompts(self.tokenizer):
            raise Refused(
                "data.supervise=turns",
                f"the tokenizer has no {' and '.join(names)}",
                "use data.supervise=answers; turns is for Qwen and other ChatML models",
            )
        return partial(_marked, opened, closed, line[0])

    def first_control(self, text: str) -> re.Match[str] | None:
        """The first special or added token inside a piece of template text."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        names = sorted((t for t in added if t.strip()), key=len, reverse=True)
        return re.search("|".join(map(re.escape, names)), text) if names else None

    def decode(self, ids: Ids, *, special: bool = False) -> str:
        """Text of ids; special tokens are left out unless `special`."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )


def _marked(opened: int, closed: int, line: int, ids: Ids) -> list[bool]:
    before = [None, *ids]
    return [
        token in (opened, closed) or (token == line and previous == closed)
        for token, previous in zip(ids, before, strict=False)
    ]
