"""Makes the families of this folder known to transformers' Auto classes; done on import, once.

Two names are shared: "glm" with transformers' GLM-4, "chatglm" by ChatGLM v1 and ChatGLM2/3. Which one a
config.json means is read from its keys, and which tokenizer "ChatGLMTokenizer" means from the vocabulary
file. No code that comes with a checkpoint is run: these classes stand in for it.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.glm.configuration_glm import GlmConfig
from transformers.utils.hub import cached_file

from luthier.errors import Refused
from luthier.models.zoo.chatglm import ChatGLMForCausalLM
from luthier.models.zoo.chatglm2 import ChatGLM2ForCausalLM
from luthier.models.zoo.configuration_chatglm import (
    ChatGLM2Config,
    ChatGLMConfig,
    is_chatglm_v1,
)
from luthier.models.zoo.configuration_glm import GLMConfig, is_legacy_glm
from luthier.models.zoo.configuration_qwen import QWenConfig
from luthier.models.zoo.glm import GLMForConditionalGeneration
from luthier.models.zoo.qwen import QWenLMHeadModel
from luthier.models.zoo.tokenization_chatglm import ChatGLMTokenizer
from luthier.models.zoo.tokenization_chatglm2 import ChatGLM2Tokenizer
from luthier.models.zoo.tokenization_glm import (
    GLMBertTokenizer,
    GLMChineseTokenizer,
    GLMGPT2Tokenizer,
    GLMRobertaTokenizer,
)
from luthier.models.zoo.tokenization_qwen import QWenTokenizer


class ByKeys(PretrainedConfig):
    """Stands for a `model_type` of several families: what is made of it is the config of one of them."""

    @classmethod
    def family(cls, config: dict[str, Any]) -> type[PretrainedConfig]:
        """The config class that these keys belong to."""
        raise TypeError(f"{cls.__name__} is no family")

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.family(kwargs)(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return cls.family(config_dict).from_dict(config_dict, **kwargs)


class AnyGLM(ByKeys):
    model_type = "glm"

    @classmethod
    def family(cls, config: dict[str, Any]) -> type[PretrainedConfig]:
        return GLMConfig if is_legacy_glm(config) else GlmConfig


class AnyChatGLM(ByKeys):
    model_type = "chatglm"

    @classmethod
    def family(cls, config: dict[str, Any]) -> type[PretrainedConfig]:
        return ChatGLMConfig if is_chatglm_v1(config) else ChatGLM2Config


class ByFile:
    """Stands for the tokenizers of one name: the vocabulary file in the folder decides."""

    files: tuple[tuple[str, type[Any]], ...]  # file -> tokenizer, in the order of looking
    origin: str

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = {"revision", "token", "cache_dir", "local_files_only", "subfolder"}
        where = {name: kwargs[name] for name in wanted & set(kwargs) if kwargs[name] is not None}
        for name, tokenizer in cls.files:
            if cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where):
                return tokenizer.from_pretrained(path, *args, **kwargs)
        raise Refused(
            f"the tokenizer of '{path}' was asked for",
            f"there is none of {', '.join(name for name, _ in cls.files)}",
            f"copy the vocabulary file from the model's repository ({cls.origin})",
        )


class AnyChatGLMTokenizer(ByFile):
    files = (("ice_text.model", ChatGLMTokenizer), ("tokenizer.model", ChatGLM2Tokenizer))
    origin = "THUDM/chatglm-6b, THUDM/chatglm2-6b"


class AnyGLMTokenizer(ByFile):
    files = (
        ("cog-pretrain.model", GLMChineseTokenizer),
        ("merges.txt", GLMGPT2Tokenizer),
        ("vocab.txt", GLMBertTokenizer),
    )
    origin = "THUDM/glm-large-chinese, THUDM/glm-10b, THUDM/glm-515m"


def register() -> None:
    """Make all four families known. A second call changes nothing."""
    AutoConfig.register("glm", AnyGLM, exist_ok=True)
    AutoConfig.register("chatglm", AnyChatGLM, exist_ok=True)
    for config in (GLMConfig, ChatGLM2Config, QWenConfig):  # by the names they have here
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for config, model in (
        (GLMConfig, GLMForConditionalGeneration),
        (ChatGLMConfig, ChatGLMForCausalLM),
        (ChatGLM2Config, ChatGLM2ForCausalLM),
        (QWenConfig, QWenLMHeadModel),
    ):
        AutoModelForCausalLM.register(config, model, exist_ok=True)
    # both generations say "ChatGLMTokenizer"; a name is known to AutoTokenizer by its class
    AnyChatGLMTokenizer.__name__ = "ChatGLMTokenizer"
    tokenizers: list[tuple[type[PretrainedConfig], type[Any]]] = [
        (GLMConfig, GLMChineseTokenizer),
        (GLMConfig, GLMGPT2Tokenizer),
        (GLMConfig, GLMRobertaTokenizer),
        (GLMConfig, GLMBertTokenizer),
        (GLMConfig, AnyGLMTokenizer),  # the last of a config is for folders that name none
        (ChatGLM2Config, ChatGLM2Tokenizer),
        (ChatGLM2Config, AnyChatGLMTokenizer),
        (ChatGLMConfig, AnyChatGLMTokenizer),
        (QWenConfig, QWenTokenizer),
    ]
    for config, tokenizer in tokenizers:
        AutoTokenizer.register(config, tokenizer_class=tokenizer, exist_ok=True)


register()
