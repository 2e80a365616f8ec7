"""The tokenizer of ChatGLM2-6B and ChatGLM3-6B: a SentencePiece model and a few tokens behind it.

A text becomes [gMASK], sop, its pieces; a pair is followed by the second text's pieces and </s>. The tokens
behind the model are not recognised in text and decode to nothing, as do <unk>, <s> and </s>. Padding is on
the left; attention mask [S] and positions [S] always come along. The vocabulary is the file tokenizer.model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.utils.generic import PaddingStrategy

from luthier.models.zoo.tokenization_chatglm import Pieces

APPENDED = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = (
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)  # ChatGLM3's, behind the others


class ChatGLM2Tokenizer(Pieces):
    """`roles`: with ChatGLM3's four; also when its tokenizer_config.json names one of them."""

    vocab_files_names: ClassVar = {"vocab_file": "tokenizer.model"}
    origin = "THUDM/chatglm2-6b"

    def __init__(
        self,
        vocab_file: str | None = None,
        unk_token: str = "<unk>",
        pad_token: str = "<unk>",
        eos_token: str = "</s>",
        roles: bool = False,
        clean_up_tokenization_spaces: bool = False,
        **kwargs: Any,
    ) -> None:
        named = [*(kwargs.get("added_tokens_decoder") or {}).values()]
        for key in ("extra_special_tokens", "additional_special_tokens"):
            named += kwargs.get(key) or []
        self.roles = roles or any(str(token) in ROLES for token in named)
        self.appended = (*APPENDED, *ROLES) if self.roles else APPENDED
        super().__init__(
            vocab_file,
            unk_token=unk_token,
            pad_token=pad_token,
            eos_token=eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )
        self.init_kwargs["roles"] = self.roles

    @property
    def vocab_size(self) -> int:
        return self.pieces.GetPieceSize() + len(self.appended)

    def get_command(self, token: str) -> int:
        """The id of a token behind the model; the original's name for it."""
        return self.pieces.GetPieceSize() + self.appended.index(token)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_command(token) if token in self.appended else self.pieces.PieceToId(token)

    def _convert_id_to_token(self, index: int) -> str:
        size = self.pieces.GetPieceSize()
        return self.pieces.IdToPiece(index) if index < size else self.appended[index - size]

    def _decode(self, token_ids: int | list[int], *args: Any, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        silent = (self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id())
        spoken = [i for i in ids if i not in silent and 0 <= i < self.pieces.GetPieceSize()]
        return super()._decode(spoken, *args, **kwargs)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        prompt = [self.get_command("[gMASK]"), self.get_command("sop"), *token_ids_0]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.pieces.eos_id()]

    # ---- prompts of its own: see `data/infilling.py`

    trained_before = 0
    blank_ids: ClassVar[tuple[int, ...]] = ()
    prompt_notes: ClassVar[tuple[str, ...]] = ()

    @property
    def stop_ids(self) -> list[int]:
        """ChatGLM3 also stops where it is another's turn."""
        turns = ("<|user|>", "<|observation|>") if self.roles else ()
        return [self.pieces.eos_id(), *map(self.get_command, turns)]

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """The chat of the original: numbered rounds, the last one open."""
        rounds = [
            f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(history, start=1)
        ]
        return f"{''.join(rounds)}[Round {len(history) + 1}]\n\n问：{query}\n\n答："

    def special_ids_around(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        return [self.get_command("[gMASK]"), self.get_command("sop")], []

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        """One row, padded on the left."""
        self.refuse_right(padding_side)
        ids = encoded_inputs["input_ids"]
        pads = self.missing(len(ids), max_length, padding_strategy, pad_to_multiple_of)
        encoded_inputs["input_ids"] = [self.pad_token_id] * pads + ids
        encoded_inputs["attention_mask"] = [0] * pads + [1] * len(ids)
        encoded_inputs["position_ids"] = [0] * pads + list(range(len(ids)))
        return encoded_inputs
