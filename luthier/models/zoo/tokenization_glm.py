"""The tokenizers of GLM: SentencePiece (Chinese models), GPT-2's, RoBERTa's and BERT's with GLM's tokens.

All share `BlankInfilling`: the tokens of blanks and pieces, and the inputs of a row with a blank, as the
original tokenizers make them. Padding is on the right, truncation cuts on the left (the blank is often
the last thing in a prompt). The network is in `glm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any, cast

import numpy as np
import torch
from tokenizers import processors
from transformers import (
    AddedToken,
    BatchEncoding,
    BertTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizer,
    RobertaTokenizer,
)

from luthier.batch import IGNORE
from luthier.errors import Refused, need
from luthier.models.zoo.configuration_glm import MASKS, SOP
from luthier.models.zoo.tokenization_chatglm import two_axes

EOP, EOS = "<|endofpiece|>", "<|endoftext|>"
# what follows the pieces in the Chinese models, in this order, where no added_tokens.json says otherwise
CHINESE_TOKENS = (
    EOS, "[SEP]", "[CLS]", "[MASK]", "[UNUSED1]", "[UNUSED2]", SOP, EOP, "[sMASK]", "[gMASK]",
)  # fmt: skip
# of the Chinese and the GPT-2 tokenizer
SPECIAL_TOKENS = {
    "eos_token": EOS,
    "pad_token": EOS,
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "sep_token": "[SEP]",
    "clean_up_tokenization_spaces": True,
}


class BlankInfilling:
    """What GLM's tokenizers have in common; the other base of the class is a tokenizer of transformers."""

    model_input_names: Sequence[str] = ("input_ids", "position_ids", "attention_mask")
    convert_tokens_to_ids: Any
    get_vocab: Any
    pad_token_id: Any
    __call__: Any

    @property
    def sop_token_id(self) -> int:
        return self.convert_tokens_to_ids(SOP)

    @property
    def eop_token_id(self) -> int:
        """The end of what fills a blank."""
        return self.convert_tokens_to_ids(EOP)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer; eos stands at the end of a source."""
        return [self.eop_token_id]

    @property
    def smask_token_id(self) -> int:
        return self.convert_tokens_to_ids("[sMASK]")

    @property
    def gmask_token_id(self) -> int:
        return self.convert_tokens_to_ids("[gMASK]")

    @property
    def mask_token_ids(self) -> list[int]:
        """Of the mask tokens that the model has: RoBERTa's and BERT's have one."""
        return [self.convert_tokens_to_ids(name) for name in self.mask_tokens]

    @property
    def mask_tokens(self) -> tuple[str, ...]:
        return MASKS

    # ---- prompts of its own: see `data/infilling.py`

    trained_before = 0
    prompt_notes: Sequence[str] = ()

    @property
    def blank_ids(self) -> list[int]:
        return self.mask_token_ids

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """Lines: GLM has no chat format."""
        return "\n".join([*(part for pair in history for part in pair), query])

    def special_ids_around(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """[CLS] before; behind [gMASK], where the text has no mask token, the end of the source and
        <|startofpiece|>."""
        first, last = self("")["input_ids"]
        masks = self.mask_token_ids  # the last one is [gMASK], where there is more than [MASK]
        blank = [] if set(masks) & set(ids) else masks[-1:]
        return [first], [*blank, last, self.sop_token_id]

    def document_positions(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n] -> [2, n]: what follows the first, second, ... <|startofpiece|> stands at the first, second, ...
        mask token of the context, while there are any."""
        found = np.asarray(ids)
        places = two_axes(found, self.sop_token_id, self.mask_token_ids)
        starts = np.flatnonzero(found == self.sop_token_id)
        context = found[: starts[0] if starts.size else 0]
        blanks = np.flatnonzero(np.isin(context, self.mask_token_ids))
        for start, blank in zip(starts[1:], blanks[1:], strict=False):
            places[0, start:] = blank
            places[1, start:] = np.arange(1, len(found) - start + 1)
        return places

    def check_special_ids(self) -> None:
        """Refused unless every token of blanks and pieces has an id, and none of them shares it."""
        vocab = self.get_vocab()
        ids = {token: vocab.get(token) for token in (*self.mask_tokens, SOP, EOP)}
        lost = [token for token, number in ids.items() if number is None]
        if lost:
            raise Refused(
                "the tokenizer of a GLM model",
                f"it has no id for {', '.join(lost)}",
                "copy added_tokens.json from the model's repository (THUDM/glm-...) into the folder",
            )
        if len(set(ids.values())) < len(ids):
            listed = ", ".join(f"{token} {number}" for token, number in ids.items())
            raise Refused(
                "the tokenizer of a GLM model",
                f"two special tokens share an id: {listed}",
                "copy added_tokens.json from the model's repository (THUDM/glm-...) into the folder",
            )

    def build_inputs_for_generation(
        self,
        model_input: BatchEncoding,
        max_gen_length: int = 512,
        targets: Any = None,
        padding: bool = False,
    ) -> BatchEncoding:
        """The inputs of rows with a blank: `model_input` [B, S] is the tokenised (right padded) source.

        Without `targets`: input_ids [B, S+1] ending with <|startofpiece|>, and position_ids [B, 2, S+g],
        generation_attention_mask [B, 1, S+g, S+g] (1 = visible) for g = `max_gen_length` new tokens. With
        `targets` (texts or ids): input_ids, position_ids, attention_mask and aligned labels of S+g tokens;
        g becomes that of the longest target unless `padding`. Refused: a source without mask token.
        """
        source = torch.as_tensor(model_input["input_ids"])
        real = torch.as_tensor(model_input["attention_mask"])
        if source.ndim == 1:
            source, real = source[None], real[None]
        rows, length = source.shape
        spans: list[list[int]] = []
        if targets is not None:
            single = isinstance(targets, str) or (bool(targets) and isinstance(targets[0], int))
            listed = [targets] if single else list(targets)
            if listed and isinstance(listed[0], str):
                listed = self(listed, add_special_tokens=False, padding=False)["input_ids"]
            spans = [[*map(int, ids), self.eop_token_id][:max_gen_length] for ids in listed]
            if not padding:
                max_gen_length = max(map(len, spans))
        whole = length + max_gen_length
        places = torch.arange(whole).repeat(rows, 1)
        places[:, length:] = torch.tensor([self._blank(row) for row in source.tolist()])[:, None]
        behind = (torch.arange(whole) - length + 1).clamp(min=0).repeat(rows, 1)
        # every row sees the real source; what is written sees what was written before it
        seen = torch.zeros(rows, whole, whole, dtype=torch.long)
        seen[:, :, :length] = real[:, None]
        seen[:, length:, length:] = torch.ones(max_gen_length, max_gen_length).tril().long()
        made = {"position_ids": torch.stack([places, behind], dim=1)}
        if targets is None:
            sop = source.new_full((rows, 1), self.sop_token_id)
            made["input_ids"] = torch.cat([source, sop], dim=1)
            made["generation_attention_mask"] = seen[:, None]
            return BatchEncoding(made)
        fed = source.new_full((rows, max_gen_length), self.pad_token_id)
        labels = torch.full((rows, whole), IGNORE)
        for i, span in enumerate(spans):
            given = [self.sop_token_id, *span][:max_gen_length]
            fed[i, : len(given)] = torch.tensor(given)
            labels[i, length : length + len(span)] = torch.tensor(span)
        made["input_ids"] = torch.cat([source, fed], dim=1)
        made["attention_mask"] = seen[:, None]
        made["labels"] = labels
        return BatchEncoding(made)

    def _blank(self, ids: list[int]) -> int:
        masks = set(self.mask_token_ids)
        for i, token in enumerate(ids):
            if token in masks:
                return i
        raise Refused(
            "GLM was asked to fill a blank",
            "a source has no mask token",
            f"put one of {', '.join(self.mask_tokens)} where the answer belongs",
        )


class GLMChineseTokenizer(BlankInfilling, PreTrainedTokenizer):
    """cog-pretrain.model (SentencePiece) and added tokens: [CLS] text <|endoftext|>."""

    vocab_files_names = {"vocab_file": "cog-pretrain.model"}  # noqa: RUF012 - transformers' own form
    truncation_side = "left"

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise need("sentencepiece", "tokenizers", "the tokenizer of a GLM model") from error
        if vocab_file is None or not Path(vocab_file).is_file():
            raise Refused(
                "the tokenizer of a GLM model",
                "the folder has no cog-pretrain.model",
                "copy it from the model's repository (THUDM/glm-large-chinese, THUDM/glm-10b-chinese)",
            )
        self.vocab_file = vocab_file
        self.sp_model = cast(Any, SentencePieceProcessor())
        try:
            self.sp_model.Load(vocab_file)
        except RuntimeError as error:
            raise Refused(
                f"the vocabulary '{vocab_file}' was asked for",
                "it is not a SentencePiece model",
                "copy it again from the model's repository (git-lfs may have left a pointer file)",
            ) from error
        if not kwargs.get("added_tokens_decoder"):
            first = self.sp_model.get_piece_size()
            kwargs["added_tokens_decoder"] = {
                first + i: AddedToken(token, special=True, normalized=False)
                for i, token in enumerate(CHINESE_TOKENS)
            }
        super().__init__(**SPECIAL_TOKENS | {"unk_token": "<unk>"} | kwargs)
        self.check_special_ids()

    @property
    def vocab_size(self) -> int:
        return self.sp_model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        pieces = {self.sp_model.id_to_piece(i): i for i in range(self.vocab_size)}
        return pieces | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.id_to_piece(index)

    def _decode(self, token_ids: int | list[int], *args: Any, **kwargs: Any) -> str:
        """Text of ids; those of the embedding's rows without a token are left out."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        known = [i for i in ids if i < self.vocab_size or i in self._added_tokens_decoder]
        return super()._decode(known, *args, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Pieces joined by SentencePiece; special tokens between them stand apart by spaces."""
        texts: list[str] = []
        pieces: list[str] = []
        for token in tokens:
            if self._added_tokens_encoder.get(token, -1) < self.vocab_size:  # a piece
                pieces.append(token)
                continue
            texts += [self.sp_model.decode(pieces)] if pieces else []
            texts.append(token)
            pieces = []
        texts += [self.sp_model.decode(pieces)] if pieces else []
        return " ".join(texts)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        if token_ids_1 is not None:
            raise Refused(
                "a pair of texts for GLM's tokenizer", "it takes one text", "join them into one"
            )
        first, last = cast(int, self.cls_token_id), cast(int, self.eos_token_id)
        return [first, *token_ids_0, last]

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        if target.resolve() != Path(self.vocab_file).resolve():
            copyfile(self.vocab_file, target)
        return (str(target),)


class GLMGPT2Tokenizer(BlankInfilling, GPT2Tokenizer):
    """GPT-2's pieces and added tokens (glm-10b, glm-2b): [CLS] text <|endoftext|>."""

    truncation_side = "left"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **SPECIAL_TOKENS | kwargs)
        self.check_special_ids()
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"[CLS] $A {EOS}",
            special_tokens=[("[CLS]", self.cls_token_id), (EOS, self.eos_token_id)],
        )


class GLMRobertaTokenizer(BlankInfilling, RobertaTokenizer):
    """RoBERTa's (glm-roberta-large): <s> text </s>, one mask token."""

    truncation_side = "left"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_special_ids()

    @property
    def mask_tokens(self) -> tuple[str, ...]:
        return (str(self.mask_token),)


class GLMBertTokenizer(BlankInfilling, BertTokenizer):
    """BERT's (glm-515m): [CLS] text [SEP], one mask token."""

    truncation_side = "left"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_special_ids()

    @property
    def mask_tokens(self) -> tuple[str, ...]:
        return (str(self.mask_token),)
