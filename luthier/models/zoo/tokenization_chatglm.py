"""The tokenizer of ChatGLM-6B (v1): SentencePiece behind marks for line ends, tabs and runs of spaces.

A text becomes its pieces, [gMASK], <sop>; a pair is followed by the second text's pieces and <eop>. Padding
is on the left and comes with the original's mask [1, S, S] (True = hidden) and positions [2, S]. The vocabulary
is the file ice_text.model. `Pieces`, what ChatGLM2's tokenizer shares, stands here too.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from transformers import PreTrainedTokenizer
from transformers.utils.generic import PaddingStrategy

from luthier.errors import Refused, need

MAX_BLANKS = 80  # the longest run of spaces with a piece of its own


def two_axes(ids: Sequence[int] | np.ndarray, start: int, *blanks: Sequence[int]) -> np.ndarray:
    """Positions [2, n] of one document: axis 0 counts the context, then stays at its blank; axis 1 counts from `start`.

    The context ends before the first `start` token; without one all is context. The blank is the first
    token of the first of `blanks` that has one; without any axis 0 counts on.
    """
    found, index = np.asarray(ids), np.arange(len(ids))
    border = next(iter(np.flatnonzero(found == start)), len(index))
    places = index.copy()
    for kinds in blanks:
        if (at := np.flatnonzero(np.isin(found, kinds))).size:
            places[border:] = at[0]
            break
    return np.stack([places, np.clip(index - border + 1, 0, None)])


class Pieces(PreTrainedTokenizer):
    """A SentencePiece model; text is cut by it alone, so that no token is looked for in the text before.

    Refused: no vocabulary file, one that is not SentencePiece's, and the package sentencepiece missing.
    """

    padding_side = "left"
    model_input_names: ClassVar = ["input_ids", "attention_mask", "position_ids"]
    origin: ClassVar[str]  # the hub name of a folder that has the vocabulary file

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        name = self.vocab_files_names["vocab_file"]
        if find_spec("sentencepiece") is None:
            raise need("sentencepiece", "tokenizers", f"the tokenizer file {name}")
        from sentencepiece import SentencePieceProcessor

        asked = f"a {type(self).__name__} was asked for"
        if vocab_file is None or not Path(vocab_file).is_file():
            where = vocab_file or "the folder"
            raise Refused(
                asked, f"{where} has no {name}", f"copy {name} from {self.origin} into it"
            )
        self.vocab_file = str(vocab_file)
        self.pieces = SentencePieceProcessor()
        try:
            self.pieces.Load(self.vocab_file)
        except RuntimeError as error:
            raise Refused(
                asked,
                f"{vocab_file} is not a SentencePiece model",
                f"copy {name} from {self.origin} again (git-lfs may have left a pointer file)",
            ) from error
        super().__init__(**kwargs)

    def get_vocab(self) -> dict[str, int]:
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)}

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.pieces.EncodeAsPieces(text)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.pieces.DecodePieces(tokens)

    @staticmethod
    def missing(
        size: int, max_length: int | None, strategy: PaddingStrategy, multiple: int | None
    ) -> int:
        """How many pads a row of `size` ids needs."""
        if strategy == PaddingStrategy.DO_NOT_PAD:
            return 0
        wanted = max_length if strategy == PaddingStrategy.MAX_LENGTH and max_length else size
        multiple = multiple or 1
        return max(-(-wanted // multiple) * multiple - size, 0)

    def refuse_right(self, padding_side: str | None) -> None:
        if (padding_side or self.padding_side) != "left":
            raise Refused(
                "padding on the right was asked for",
                f"{type(self).__name__} pads on the left only",
                "use padding_side='left'",
            )

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Copy the vocabulary file."""
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


class ChatGLMTokenizer(Pieces):
    """`num_image_tokens` ids stand before those of the file: 20000 in the first release, 0 since then.

    Refused, beside what `Pieces` refuses: a vocabulary without the special tokens.
    """

    vocab_files_names: ClassVar = {"vocab_file": "ice_text.model"}
    origin = "THUDM/chatglm-6b"

    def __init__(
        self,
        vocab_file: str | None = None,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 0,
        clean_up_tokenization_spaces: bool = True,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        # `from_pretrained` hands these two over as special tokens, which they are not in the original:
        # skip_special_tokens keeps them
        own = {"gmask_token": gmask_token, "end_token": end_token}
        own |= kwargs.pop("model_specific_special_tokens", None) or {}
        self.gmask_token, self.end_token = str(own["gmask_token"]), str(own["end_token"])
        super().__init__(
            vocab_file,
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )
        self.init_kwargs.pop("model_specific_special_tokens", None)
        self.init_kwargs.update(own, num_image_tokens=num_image_tokens)
        special = (bos_token, eos_token, mask_token, pad_token, self.gmask_token, self.end_token)
        lacking = [str(t) for t in special if self.pieces.PieceToId(str(t)) == self.pieces.unk_id()]
        if lacking:
            raise Refused(
                "a ChatGLMTokenizer was asked for",
                f"{vocab_file} lacks {', '.join(lacking)}",
                f"copy ice_text.model from {self.origin}",
            )

    @property
    def vocab_size(self) -> int:
        return self.pieces.GetPieceSize() + self.num_image_tokens

    @property
    def gmask_token_id(self) -> int:
        return self._convert_token_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        return self._convert_token_to_id(self.end_token)

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.PieceToId(token) + self.num_image_tokens

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        return self.pieces.IdToPiece(index - self.num_image_tokens)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        runs = f" {{2,{MAX_BLANKS}}}"
        return super().tokenize(
            re.sub(runs, lambda run: f"<|blank_{len(run[0])}|>", text), **kwargs
        )

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text = super().convert_tokens_to_string(tokens)
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d\d?)\|>", lambda blanks: " " * int(blanks[1]), text)

    def _decode(self, token_ids: int | list[int], *args: Any, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        # the embedding has more rows than there are pieces
        kept = [i for i in ids if i != self.pad_token_id and i < self.vocab_size]
        return super()._decode(kept, *args, **kwargs)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        bos, eos = (self._convert_token_to_id(str(t)) for t in (self.bos_token, self.eos_token))
        prompt = [*token_ids_0, self.gmask_token_id, bos]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, eos]

    # ---- prompts of its own: see `data/infilling.py`

    trained_before = 1  # <sop>, which follows from [gMASK]
    blank_ids: ClassVar[tuple[int, ...]] = ()  # [gMASK] is always appended
    prompt_notes: ClassVar[tuple[str, ...]] = ()

    @property
    def stop_ids(self) -> list[int]:
        return [cast(int, self.eos_token_id)]

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """The chat of the original: the query alone, or numbered rounds and an open one."""
        if not history:
            return query
        rounds = [f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(history)]
        return f"{''.join(rounds)}[Round {len(history)}]\n问：{query}\n答："

    def special_ids_around(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        return [], [self.gmask_token_id, cast(int, self.bos_token_id)]

    def document_positions(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n] -> [2, n], by the model's rule: [gMASK] goes before [MASK]."""
        blanks = [self.gmask_token_id], [cast(int, self.mask_token_id)]
        return two_axes(ids, cast(int, self.bos_token_id), *blanks)

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        """One row, padded on the left; the original adds mask and positions only where a length is known."""
        ids = encoded_inputs["input_ids"]
        self.refuse_right(padding_side)
        if max_length is None and padding_strategy == PaddingStrategy.DO_NOT_PAD:
            return encoded_inputs
        pads = self.missing(len(ids), max_length, padding_strategy, pad_to_multiple_of)
        mask, positions = self._mask_and_positions(ids)
        encoded_inputs["input_ids"] = [self.pad_token_id] * pads + ids
        encoded_inputs["attention_mask"] = np.pad(
            mask, ((0, 0), (pads, 0), (pads, 0)), constant_values=True
        )
        encoded_inputs["position_ids"] = np.pad(positions, ((0, 0), (pads, 0)))
        return encoded_inputs

    def _mask_and_positions(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """[1, S, S], True = hidden, and [2, S] of one row; here [MASK] goes before [gMASK]."""
        blanks = [cast(int, self.mask_token_id)], [self.gmask_token_id]
        positions = two_axes(ids, cast(int, self.bos_token_id), *blanks)
        hidden = np.triu(np.ones((1, len(ids), len(ids)), dtype=bool), k=1)
        hidden[:, :, positions[1] == 0] = False
        return hidden, positions
