"""`data`: which rows, and how they become examples and packed rows. Part of `config.py`, which documents the whole tree."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from luthier.config_optim import Positive, Section


class DataPart(Section):
    path: str = Field(description="Folder, file or hub name.")
    weight: float = Field(
        1.0, gt=0, description="Relative share of the rows drawn, whatever the size of this part."
    )
    format: Literal["auto", "src_tgt", "alpaca", "messages", "sharegpt", "text"] = Field(
        "auto", description="Row format of this part."
    )


class DataConfig(Section):
    path: str | tuple[DataPart, ...] = Field(
        description="Training data: a folder with train.json or train/*.json (and dev.json or dev/*.json), "
        "a file (.json, .jsonl, .parquet, .arrow), a hub name, or a list of {path, weight}."
    )
    validation_path: str | None = Field(
        None,
        description="Evaluation data. Default: the dev, validation or test part beside `path`.",
    )
    format: Literal["auto", "src_tgt", "alpaca", "messages", "sharegpt", "text"] = Field(
        "auto",
        description="Row format. `auto` recognises it by its field names and says which it took.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Field names of the format -> field names in the file, e.g. {src: content, tgt: summary}.",
    )
    template: str = Field(
        "auto",
        description="Chat template: `auto` (the tokenizer's, else none), `none`, or a file: Jinja, or "
        "PaddleNLP's chat_template.json.",
    )
    supervise: Literal["answers", "turns"] = Field(
        "answers",
        description="What is trained: every answer with its end token, or (`turns`, ChatML tokenizers) also the "
        "tokens that open and close every message, as Qwen's own fine-tuning code.",
    )
    blanks: Literal["none", "spans", "sentences", "rest", "mixed"] = Field(
        "none",
        description="What GLM fills in rows of text: the whole text, spans of a few tokens ([MASK]), sentences ([sMASK]), the end ([gMASK]), or one of the three by chance.",
    )
    length: Annotated[int, Field(ge=2)] = Field(
        2048, description="Longest row in tokens, prompt and answer; also the size of a packed row."
    )
    source_length: Positive | None = Field(
        None,
        description="Longest prompt in tokens; what is cut is its oldest text. With a chat template it acts only when the last round alone does not fit. Default: no limit of its own.",
    )
    overlong: Literal["cut", "drop", "split", "refuse"] = Field(
        "cut", description="What happens to examples longer than `length`."
    )
    packing: Literal["none", "sequential", "greedy", "best"] = Field(
        "best",
        description="How examples share rows: `none`, in order, PaddleNLP's greedy, or `best` (rows filled exactly, least padding).",
    )
    lazy: bool = Field(
        False,
        description="Read and tokenise while training, without holding the data in memory; needs train.steps or train.tokens.",
    )
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        2,
        description="Processes that tokenise. The result does not depend on it; 0 = in the main process.",
    )
    pose: bool | Literal["off", "paper", "paddlenlp"] = Field(
        "off",
        description="Let the positions of training documents skip, so that rows of `length` tokens train for "
        "`pose_window` (PoSE, arXiv:2309.10400): the `paper`'s form, or PaddleNLP's, which acts on texts longer "
        "than `length` only.",
    )
    pose_window: Positive | None = Field(
        None, description="Longest context that `pose` trains for: positions lie below it."
    )
    validation_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of the training rows held out for evaluation when there is no dev file.",
    )
    split: str | None = Field(
        None,
        description='Pretraining: shares of the documents, in their order, for training, evaluation and test, such as "949,50,1". Default: all are trained; dev files, validation_path or validation_share give the evaluation.',
    )
    borders: Literal["keep", "ignore"] = Field(
        "keep",
        description="Pretraining: `keep` documents of a row apart (no attention across, positions from 0), or `ignore` borders: the classic form, in which tokens see the documents before theirs.",
    )
    cache: str | None = Field(
        None,
        description="Pretraining: folder of the tokenised shards, used again by every run on the same text and tokenizer. Default: luthier/tokens in the user's cache folder.",
    )

    @model_validator(mode="after")
    def _split(self) -> DataConfig:
        if self.split is None:
            return self
        try:
            shares = [float(share) for share in self.split.split(",")]
        except ValueError:
            shares = []
        if len(shares) != 3 or not all(0 <= share < float("inf") for share in shares):
            raise ValueError(f'data.split={self.split}: expected three shares such as "949,50,1"')
        if not shares[0]:
            raise ValueError(f"data.split={self.split} leaves nothing to train")
        return self

    @model_validator(mode="after")
    def _pose(self) -> DataConfig:
        if isinstance(self.pose, bool):  # YAML reads `off` as false
            object.__setattr__(self, "pose", "paper" if self.pose else "off")
        if self.pose == "off" and self.pose_window is not None:
            raise ValueError(
                "data.pose_window has no meaning without data.pose; add data.pose=paper"
            )
        if self.pose != "off" and (self.pose_window or 0) < self.length:
            raise ValueError(
                f"data.pose={self.pose} needs data.pose_window, the context to train for: at least "
                f"data.length={self.length}, usually several times that"
            )
        if self.pose == "paddlenlp" and self.overlong != "cut":
            raise ValueError(
                f"data.pose=paddlenlp takes its chunks from texts that are too long, which data.overlong="
                f"{self.overlong} does not leave to it; use data.overlong=cut or data.pose=paper"
            )
        return self

    @property
    def reach(self) -> int:
        """Positions that a training document may take: `length`, or with PoSE its window."""
        return self.pose_window or self.length
