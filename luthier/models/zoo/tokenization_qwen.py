"""The tokenizer of Qwen v1: byte-level BPE of tiktoken over `qwen.tiktoken`, and its ChatML prompt.

Tokens of the vocabulary are bytes, special ones are text. Text is NFC-normalised; special tokens written in it
are taken as such unless `allowed_special=set()`. Nothing is added in front or behind. The network is in
`qwen.py`.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Collection, Sequence, Set
from pathlib import Path
from shutil import copyfile
from typing import Any, Literal

from transformers import AddedToken, PreTrainedTokenizer

from luthier.errors import Refused, need

VOCABULARY = "qwen.tiktoken"
# contractions, letters with one other character before them, single digits, punctuation, line ends, spaces
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, START_TURN, END_TURN, *(f"<|extra_{i}|>" for i in range(205)))
SYSTEM = "You are a helpful assistant."
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_ranks(file: Path) -> dict[bytes, int]:
    """Bytes -> rank of a .tiktoken file; refused unless the ranks are 0, 1, 2, ... without a gap."""
    try:
        pairs = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise _broken(file, "a line is not a base64 token and its rank") from error
    if not ranks or sorted(ranks.values()) != list(range(len(pairs))):
        raise _broken(file, "its ranks are not 0, 1, 2, ...: special ids would be wrong")
    return ranks


class QWenTokenizer(PreTrainedTokenizer):
    """`eod_id`, `im_start_id` and `im_end_id` are the ids behind the ranks; 205 <|extra_i|> follow."""

    vocab_files_names = {"vocab_file": VOCABULARY}  # noqa: RUF012 - transformers' own form

    def __init__(
        self, vocab_file: str | None = None, errors: str = "replace", **kwargs: Any
    ) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise need("tiktoken", "tokenizers", "the tokenizer of a Qwen v1 model") from error
        if vocab_file is None or not Path(vocab_file).is_file():
            raise Refused(
                "the tokenizer of a Qwen v1 model",
                f"the folder has no {VOCABULARY}",
                "copy it from the model's repository (Qwen/Qwen-7B)",
            )
        self.vocab_file, self.errors = vocab_file, errors
        self.mergeable_ranks = read_ranks(Path(vocab_file))
        first = len(self.mergeable_ranks)
        self.special_tokens = {token: first + i for i, token in enumerate(SPECIAL)}
        self.tokenizer = tiktoken.Encoding(
            "qwen",
            pat_str=PATTERN,
            mergeable_ranks=self.mergeable_ranks,
            special_tokens=self.special_tokens,
        )
        self.decoder: dict[int, bytes | str] = {i: t for t, i in self.mergeable_ranks.items()}
        self.decoder |= {i: token for token, i in self.special_tokens.items()}
        self.eod_id = self.special_tokens[END]
        self.im_start_id = self.special_tokens[START_TURN]
        self.im_end_id = self.special_tokens[END_TURN]
        added = dict(kwargs.pop("added_tokens_decoder", None) or {})
        wrong = [f"{t} {i}" for i, t in added.items() if self.special_tokens.get(str(t)) != i]
        if wrong:
            raise Refused(
                f"the ids {', '.join(wrong)} for special tokens of Qwen",
                f"behind the {first} ranks of {VOCABULARY} they are others",
                "remove added_tokens_decoder from tokenizer_config.json",
            )
        for token in (END, START_TURN, END_TURN):  # what templates use
            added[self.special_tokens[token]] = AddedToken(token, special=True, normalized=False)
        for name, token in kwargs.items():
            if name.endswith("_token") and token and str(token) not in self.special_tokens:
                raise Refused(
                    f"{name}={str(token)!r} for Qwen's tokenizer",
                    "it is none of its special tokens",
                    f"use {END}, {START_TURN}, {END_TURN} or <|extra_0|> ... <|extra_204|>",
                )
        super().__init__(
            **{"eos_token": END, "chat_template": CHATML} | kwargs, added_tokens_decoder=added
        )

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.n_vocab

    def get_vocab(self) -> dict[Any, int]:
        """Bytes, and text for special tokens -> id."""
        return {**self.mergeable_ranks, **self.special_tokens}

    def tokenize(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        text: str,
        allowed_special: Literal["all"] | Set[str] = "all",
        disallowed_special: Literal["all"] | Collection[str] = (),
        **kwargs: Any,
    ) -> list[bytes | str]:
        """Tokens of a text; of the special tokens written in it, those of `allowed_special` are taken as such."""
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            allowed_special = set()
        ids = self.tokenizer.encode(
            unicodedata.normalize("NFC", text),
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
        )
        return [self.decoder[i] for i in ids]

    def _convert_token_to_id(self, token: bytes | str) -> int | None:
        if isinstance(token, str) and token in self.special_tokens:
            return self.special_tokens[token]
        key = token.encode() if isinstance(token, str) else token
        return self.mergeable_ranks.get(key)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        if isinstance(tokens, str | bytes):
            return self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    def _convert_id_to_token(self, index: int) -> Any:
        if index in self.decoder:
            return self.decoder[index]
        raise ValueError(f"{index} is no id of Qwen's tokenizer, which has {self.vocab_size}")

    def convert_tokens_to_string(self, tokens: Sequence[bytes | str]) -> str:
        whole = b"".join(t.encode() if isinstance(t, str) else t for t in tokens)
        return whole.decode("utf-8", errors=self.errors)

    def _decode(
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if skip_special_tokens:
            ids = [i for i in ids if i < self.eod_id]
        return self.tokenizer.decode(ids, errors=kwargs.get("errors") or self.errors)

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Special tokens are all there; their ids are fixed by the vocabulary."""
        unknown = [str(t) for t in new_tokens or () if str(t) not in self.special_tokens]
        if unknown:
            raise Refused(
                f"new tokens for Qwen's tokenizer: {', '.join(unknown)}",
                "its vocabulary is fixed",
                "use <|extra_0|> ... <|extra_204|>",
            )
        return super()._add_tokens(new_tokens, special_tokens=special_tokens)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        target = Path(save_directory) / VOCABULARY
        if target.resolve() != Path(self.vocab_file).resolve():
            copyfile(self.vocab_file, target)
        return (str(target),)


def make_context(
    tokenizer: QWenTokenizer,
    query: str,
    history: Sequence[tuple[str, str]] = (),
    system: str = "",
    max_window_size: int = 6144,
    chat_format: Literal["chatml", "raw"] = "chatml",
) -> tuple[str, list[int]]:
    """Text and ids of the official chat prompt.

    ChatML takes turns of the `history` from the newest back while the ids stay below `max_window_size`.
    What people wrote is encoded without special tokens, so that it cannot open or close a turn. Raw is the
    query alone.
    """
    if chat_format == "raw":
        return query, tokenizer.tokenizer.encode(
            query, allowed_special=set(), disallowed_special=()
        )
    line = tokenizer.tokenizer.encode("\n")
    opened, closed = [tokenizer.im_start_id], [tokenizer.im_end_id]

    def turn(role: str, content: str) -> tuple[str, list[int]]:
        ids = tokenizer.tokenizer.encode(role, allowed_special=set(), disallowed_special=())
        said = tokenizer.tokenizer.encode(content, allowed_special=set(), disallowed_special=())
        return f"{START_TURN}{role}\n{content}{END_TURN}", opened + ids + line + said + closed

    begin_text, begin = turn("system", system)
    asked_text, asked = turn("user", query)
    tail_text = f"\n{asked_text}\n{START_TURN}assistant\n"
    role = tokenizer.tokenizer.encode("assistant")
    tail = line + asked + line + opened + role + line
    middle_text, middle = "", []
    for question, answer in reversed(history):
        user_text, user = turn("user", question)
        said_text, said = turn("assistant", answer)
        ids = line + user + line + said
        if len(begin) + len(ids) + len(middle) >= max_window_size:
            break
        middle_text, middle = f"\n{user_text}\n{said_text}{middle_text}", ids + middle
    return begin_text + middle_text + tail_text, begin + middle + tail


def _broken(file: Path, found: str) -> Refused:
    return Refused(
        f"the vocabulary '{file}' was asked for",
        found,
        "copy it again from the model's repository (git-lfs may have left a pointer file)",
    )
