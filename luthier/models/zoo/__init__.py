"""Families of the reference suites that transformers lacks: ChatGLM v1, ChatGLM2/3, GLM, Qwen v1.

`register.py` makes them known to the Auto classes.
"""

# what their config.json files say; "glm" is GLM-4's in transformers too, "chatglm" has two generations
MODEL_TYPES = ("chatglm", "glm", "qwen")
# vocabulary files beside those that transformers' families have
VOCABULARIES = ("ice_text.model", "cog-pretrain.model", "qwen.tiktoken")
