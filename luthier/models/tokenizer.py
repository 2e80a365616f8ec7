"""The tokenizer of a model folder: read, compared with the model, and its id to pad with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from luthier.errors import Refused, need
from luthier.models import folder
from luthier.models.folder import quiet


def load_tokenizer(
    path: str | Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or hub name; None where it has no tokenizer files."""
    where = folder.find_folder(path, code=trust_remote_code)
    if not folder.has_tokenizer(where):
        return None
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        except ImportError as error:
            package = "protobuf" if "protobuf" in str(error) else "sentencepiece"
            raise need(package, "tokenizers", f"the tokenizer of '{where}'") from error
        except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
            if not (where / "tokenizer.json").is_file() and not find_spec("sentencepiece"):
                raise need("sentencepiece", "tokenizers", f"the tokenizer of '{where}'") from error
            raise Refused(
                f"the tokenizer of '{where}' was asked for",
                f"it cannot be read: {folder.first_line(error)}",
                "copy or download its files again",
            ) from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Refuse a tokenizer with ids that the model's embedding lacks (rule 5 of the contract).

    A vocabulary that is larger than the tokenizer's is normal: it is padded.
    """
    rows = model_config.get_text_config().vocab_size
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        token, highest = max(beyond.items(), key=lambda item: item[1])
        raise Refused(
            "the tokenizer and the model do not fit",
            f"{len(beyond)} of its tokens (up to {highest}, {token!r}) exceed the embedding's {rows} rows",
            "use the model's own tokenizer",
        )
    for name in ("sop_token_id", "gmask_token_id", "mask_token_ids"):  # of models/zoo
        said, has = (getattr(each, name, None) for each in (model_config, tokenizer))
        if said is not None and has is not None and said != has:
            raise Refused(
                "the tokenizer and the model do not fit",
                f"config.json has {name}={said}, the tokenizer {has}",
                "give the tokenizer files and the config.json that came with the weights",
            )


def pad_id(tokenizer: PreTrainedTokenizerBase | None, model_config: PretrainedConfig) -> int:
    """An id to pad rows with: the tokenizer's, else its end of text, else the model's, else 0.

    It is never looked at; it only has to be an id of the embedding.
    """
    found = [getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    text = model_config.get_text_config()
    found += [getattr(text, "pad_token_id", None), getattr(text, "eos_token_id", None)]
    for value in found:
        first = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(first, int) and 0 <= first < text.vocab_size:
            return first
    return 0
