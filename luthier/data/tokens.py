"""A tokenizer as the renderer needs it: ids of pieces of text, never a special token by itself.

Only `Tokens.prefix` and `Tokens.suffix` say which special tokens belong around a plain prompt; the
templates put them there, once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from luthier.data.truncation import Ids
from luthier.errors import Refused

PROBE = "a"
KNOWN = 1000  # pieces of text whose ids are remembered: what templates print around turns is always the same
SHORT = 500  # characters of such a piece at most
WORDS = 100_000  # remembered in the same way
LONG = 50  # characters of such a word at most: in Chinese, where no blanks are, a word is a paragraph that never returns
FEW = 5000  # so many are remembered whatever text they stand in
# pre-tokenizers that do with a piece of text what they do with it beside a special token
LOCAL = {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"}
# Before a single space a pre-token ends, in GPT-2's way of cutting texts (ByteLevel's own) and in those of Llama 3
# and Qwen 2: whatever holds a space begins with it, or is nothing but white space
WORD = re.compile(r"(?: ?\S+|\s+\S*)(?:(?! \S)\s+\S*)*")
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rf"\p{{N}}{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for number in ("", "{1,3}")
}


def is_plain(tokenizer: Any) -> bool:
    """Whether calling it does nothing beside its Rust tokenizer, which alone takes a third of the time."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.split_special_tokens:
        return False
    kind, names = type(tokenizer), ("__call__", "_encode_plus")
    return all(getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in names)


def borders(tokenizer: Any) -> re.Pattern[str] | None:
    """What finds the added tokens in a text, if the ids of a text are those of the pieces between them, one after the
    other; None where a piece may depend on what stands beside it."""
    rust = tokenizer.backend_tokenizer
    added = [token for token in rust.get_added_tokens_decoder().values() if token.content]
    wide = any(token.lstrip or token.rstrip or token.single_word for token in added)
    # tokens that are looked for in the text as it is; then each piece is normalised by itself
    if not added or wide or any(token.normalized for token in added):
        return None
    steps = _steps(rust)
    if any(step["type"] not in LOCAL or step.get("add_prefix_space") for step in steps):
        return None
    names = sorted((token.content for token in added), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})") if steps else None


def has_words(tokenizer: Any) -> bool:
    """Whether the ids of a text, if it has `borders`, are those of its words cut by `WORD`."""
    rust = tokenizer.backend_tokenizer
    steps = _steps(rust)
    ways = [
        step.get("use_regex") or step.get("pattern", {}).get("Regex") in SPLITS for step in steps
    ]
    known = all(w or s["type"] in ("ByteLevel", "Digits") for w, s in zip(ways, steps, strict=True))
    normal = rust.normalizer is None or type(rust.normalizer).__name__ == "NFC"
    splits = (step for step in steps if step["type"] == "Split")
    apart = all(step["behavior"] == "Isolated" and not step["invert"] for step in splits)
    return known and any(ways) and apart and normal


def _steps(rust: Any) -> list[dict[str, Any]]:
    """What the pre-tokenizer does; empty where texts may become other ids at other times."""
    if getattr(rust.model, "dropout", None) or rust.pre_tokenizer is None:
        return []
    first = json.loads(rust.pre_tokenizer.__getstate__())
    return first["pretokenizers"] if first["type"] == "Sequence" else [first]


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
        self._plain = is_plain(tokenizer)
        self._borders = borders(tokenizer) if self._plain else None
        self._words = self._borders is not None and has_words(tokenizer)
        self._known: dict[str, Ids] = {}
        self._known_words: dict[str, Ids] = {}
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

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text becomes."""
        known = self.tokenizer
        found = hashlib.sha256(f"{self.opening} {self.end}".encode())
        backend = getattr(known, "backend_tokenizer", None)
        if backend is None:  # in Python: its class, its words, its model's file
            # Qwen v1's words are bytes, its special tokens strings
            words = sorted(known.get_vocab().items(), key=lambda w: (isinstance(w[0], bytes), w))
            found.update(f"{type(known).__qualname__} {words}".encode())
            file = getattr(known, "vocab_file", None)
            found.update(Path(file).read_bytes() if file and Path(file).is_file() else b"")
        else:
            parts = json.loads(backend.to_str())
            for name in ("padding", "truncation"):  # of the latest call
                parts.pop(name, None)
            found.update(json.dumps(parts, sort_keys=True).encode())
        return found.hexdigest()

    def __call__(self, text: str) -> Ids:
        """Ids of a text that stands alone, without special tokens of its own."""
        if not self._plain:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if self._borders is None:
            return list(self._piece(text))
        pieces = self._borders.split(text)  # every second one is an added token
        if len(pieces) == 1:
            return list(self._piece(text))
        ids: Ids = []
        for n, piece in enumerate(pieces):
            if piece:
                ids += self._known.get(piece) or self._piece(piece, whole=n % 2 == 1)
        return ids

    def _piece(self, text: str, *, whole: bool = False) -> Ids:
        """Ids that nobody may change; of a text that has no words if it is `whole`."""
        found = self._known.get(text)
        if found is None:
            by_words = self._words and not whole
            found = self._of_words(text) if by_words else self._encode([text])[0]
            if len(text) <= SHORT:
                if len(self._known) >= KNOWN:
                    self._known.clear()
                self._known[text] = found
        return found

    def _of_words(self, text: str) -> Ids:
        words, known = WORD.findall(text), self._known_words
        try:
            return list(chain.from_iterable(map(known.__getitem__, words)))
        except KeyError:
            return self._of_new_words(text, words)

    def _of_new_words(self, text: str, words: list[str]) -> Ids:
        known = self._known_words
        found = {word: known.get(word) for word in words}  # another thread may empty what is known
        new = [word for word, ids in found.items() if ids is None]
        if 2 * len(new) > len(words) and len(known) > FEW:
            return self._encode([text])[0]  # of rare words: word by word would be slower
        fresh = dict(zip(new, self._encode(new), strict=True)) if new else {}
        if len(known) > WORDS:
            known.clear()
        known.update((word, ids) for word, ids in fresh.items() if len(word) <= LONG)
        return [i for word in words for i in (found[word] or fresh.get(word, ()))]

    def _encode(self, texts: list[str]) -> list[Ids]:
        rust = self.tokenizer.backend_tokenizer
        # a call for a padded or cut batch, anywhere, leaves these switched on
        if rust.truncation or rust.padding or rust.encode_special_tokens:
            given = self.tokenizer(texts, add_special_tokens=False, verbose=False)
            return [list(ids) for ids in given["input_ids"]]
        return [found.ids for found in rust.encode_batch_fast(texts, add_special_tokens=False)]

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
