"""The renderer: what is trained, that prediction sees the same ids, what is lost when rows are too long."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tokenizers as tiny
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.batch import IGNORE, PADDING
from luthier.data.checks import check_labels, check_supervision
from luthier.data.encode import Dropped, Example, Renderer, TooLong, reference
from luthier.data.formats import FORMATS, BadRow, Message
from luthier.data.jinja import Jinja
from luthier.data.tokens import LONG, SPLITS, Tokens, borders, has_words, is_plain
from luthier.errors import Failed, Refused

SAMPLES = Path(os.environ.get("LUTHIER_CONFIGS", "absent"), "paddlenlp", "_sample-data")


def talk(*texts: str, system: str = "", context: dict[str, Any] | None = None) -> list[Message]:
    """user, assistant, user, ... of these texts."""
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], t, bool(i % 2)) for i, t in enumerate(texts)]
    out = [Message("system", system, False), *turns] if system else turns
    first = out[0]
    return [Message(first.role, first.text, first.supervised, context or {}), *out[1:]]


def one(renderer: Renderer, messages: list[Message]) -> Example:
    (example,) = renderer.encode(messages)
    check_labels(example.input_ids, example.labels)
    assert 2 <= len(example.input_ids) <= renderer.length
    assert example.input_ids.dtype == np.int32 and example.labels.dtype == np.int64
    return example


def shown(renderer: Renderer, example: Example) -> str:
    """The example's text with trained tokens in square brackets."""
    out, trained = "", np.concatenate([[False], example.labels[:-1] != IGNORE])
    borders = np.flatnonzero(np.diff(trained)) + 1
    for part in np.split(np.arange(len(trained)), borders):
        text = renderer.tokens.decode(example.input_ids[part].tolist(), special=True)
        out += f"[{text}]" if trained[part[0]] else text
    return out


class TestPlain:
    def test_one_turn(self) -> None:
        renderer = Renderer(tiny.byte_level(), "none")
        example = one(renderer, talk("ask", "say"))
        assert shown(renderer, example) == "<s>ask[say</s>]"
        assert example.cut == 0 and renderer.ends_in_stop(example)

    def test_system_and_turns(self) -> None:
        renderer = Renderer(tiny.byte_level(), "auto")  # this tokenizer has no template
        example = one(renderer, talk("ask", "say", "more", "end", system="be good"))
        assert shown(renderer, example) == "<s>be good\nask[say</s>]more[end</s>]"

    def test_text(self) -> None:
        renderer = Renderer(tiny.byte_level(), "auto")
        example = one(renderer, FORMATS["text"]({"text": "story"}))
        assert shown(renderer, example) == "<s>[story</s>]"
        assert (
            renderer.prompt(FORMATS["text"]({"text": "story"})) == example.input_ids[:-1].tolist()
        )

    def test_pieces_are_tokenised_apart(self) -> None:
        """`\\n` and `A` would merge over the border; prediction cannot know the answer's first letter."""
        renderer = Renderer(tiny.byte_level(), "none")
        example = one(renderer, talk("ask\n", "A"))
        prompt = renderer.prompt(talk("ask\n"))
        assert example.input_ids[: len(prompt)].tolist() == prompt
        assert shown(renderer, example) == "<s>ask\n[A</s>]"

    def test_an_answer_that_holds_eos_gets_no_second(self) -> None:
        renderer = Renderer(tiny.byte_level(), "none")
        assert shown(renderer, one(renderer, talk("ask", "say</s>"))) == "<s>ask[say</s>]"

    def test_closing_eos_of_the_tokenizer_is_left_out_of_prompts(self) -> None:
        from tokenizers import processors

        tokenizer = pickle.loads(pickle.dumps(tiny.byte_level()))
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        renderer = Renderer(tokenizer, "none")
        assert shown(renderer, one(renderer, talk("ask", "say"))) == "<s>ask[say</s>]"

    def test_two_bos_are_refused(self) -> None:
        with pytest.raises(BadRow, match="two <s>"):
            Renderer(tiny.byte_level(), "none").encode(talk("<s>ask", "say"))

    def test_length_of_the_special_tokens(self) -> None:
        from tokenizers import processors

        tokenizer = pickle.loads(pickle.dumps(tiny.byte_level()))
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> <think> $A", special_tokens=[("<s>", 1), ("<think>", 5)]
        )
        assert Renderer(tokenizer, "none", length=3).tokens.prefix == [1, 5]
        with pytest.raises(Refused, match="special tokens take all"):
            Renderer(tokenizer, "none", length=2)

    def test_no_eos(self) -> None:
        with pytest.raises(Refused, match="has none"):
            Renderer(tiny.byte_level(eos=False), "none")


class TestChat:
    @pytest.mark.parametrize(
        ("tokenizer", "trained"),
        [
            (tiny.byte_level(False, tiny.CHATML), ["say<|im_end|>", "end<|im_end|>"]),
            (tiny.byte_level(False, tiny.MARKED), ["say<|im_end|>", "end<|im_end|>"]),
            (tiny.byte_level(False, tiny.PHI3), ["say<|im_end|>", "end<|im_end|>"]),
            (tiny.sentencepiece(tiny.LLAMA2), [" say </s>", " end </s>"]),
            (tiny.sentencepiece("<s>" + tiny.CHATML), ["say<|im_end|>", "end<|im_end|>"]),
        ],
        ids=["chatml", "marked", "phi3", "llama2", "blank in front"],
    )
    def test_equals_the_template_and_trains_answers(
        self, tokenizer: Any, trained: list[str]
    ) -> None:
        renderer = Renderer(tokenizer)
        messages = talk("ask", "say", "more", "end", system="be good")
        example = one(renderer, messages)
        chat = [{"role": m.role, "content": m.text} for m in messages]
        whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        if tokenizer.chat_template == tiny.PHI3:  # its EOS stands at the very end only
            assert tokenizer.decode(whole).endswith("\n</s>")
        assert example.input_ids.tolist() == whole
        spans = shown(renderer, example).replace("[inst]", "").replace("[/inst]", "")
        assert [part.split("]")[0] for part in spans.split("[")[1:]] == trained
        asked = tokenizer.apply_chat_template(
            chat[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert renderer.prompt(messages) == renderer.prompt(messages[:-1]) == asked
        assert example.input_ids[: len(asked)].tolist() == asked
        assert renderer.ends_in_stop(example) and not renderer.notes
        check_supervision(renderer, messages, example)

    def test_answer_that_would_merge_with_the_prompt(self) -> None:
        renderer = Renderer(tiny.byte_level(False, tiny.CHATML))
        messages = talk("ask", "\nA", "more", "Also")
        example = one(renderer, messages)
        for stop in (2, 4):
            prompt = renderer.prompt(messages[:stop])
            assert example.input_ids[: len(prompt)].tolist() == prompt
        check_supervision(renderer, messages, example)

    def test_muted_answer(self) -> None:
        renderer = Renderer(tiny.byte_level(False, tiny.CHATML))
        messages = talk("ask", "say", "more", "end")
        messages[1] = Message("assistant", "say", False)
        example = one(renderer, messages)
        assert shown(renderer, example).count("[") == 1
        assert "[end<|im_end|>]" in shown(renderer, example)
        check_supervision(renderer, messages, example)
        messages[3] = Message("assistant", "end", False)
        with pytest.raises(Dropped, match="no token of it is supervised"):
            renderer.encode(messages)

    def test_rewritten_history_trains_the_last_answer_and_says_so(self) -> None:
        renderer = Renderer(tiny.byte_level(False, tiny.QWEN3))
        messages = talk("ask", "<think>hm</think>say", "more", "<think>so</think>end")
        example = one(renderer, messages)
        assert "only the last answer" in example.note
        assert shown(renderer, example) == (
            "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\nsay<|im_end|>\n"
            "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
            "[<think>\nso\n</think>\n\nend<|im_end|>]\n"
        )
        assert (
            renderer.prompt(messages)
            == example.input_ids[: len(renderer.prompt(messages))].tolist()
        )
        check_supervision(renderer, messages, example)
        assert one(renderer, talk("ask", "say")).note == ""

    @pytest.mark.parametrize(
        ("template", "role"), [(tiny.NO_SYSTEM, "system"), (tiny.NO_EARLIER_ANSWERS, "assistant")]
    )
    def test_lost_message_is_refused(self, template: str, role: str) -> None:
        renderer = Renderer(tiny.byte_level(False, template))
        messages = talk("ask", "say", "more", "end", system="be good")
        with pytest.raises(Refused, match=f"drops the {role} message"):
            renderer.encode(messages)
        with pytest.raises(Refused, match=f"drops the {role} message"):
            renderer.prompt(messages)

    def test_template_that_rejects_a_role(self) -> None:
        renderer = Renderer(tiny.byte_level(False, tiny.REFUSES_SYSTEM))
        assert renderer.encode(talk("ask", "say"))
        with pytest.raises(BadRow, match="no system role"):
            renderer.encode(talk("ask", "say", system="be good"))

    def test_generation_prompt_that_answers_do_not_begin_with(self) -> None:
        with pytest.raises(Refused, match="generation prompt ends in"):
            Renderer(tiny.byte_level(False, tiny.R1)).encode(talk("ask", "say"))

    def test_template_without_an_end(self) -> None:
        renderer = Renderer(tiny.byte_level(False, tiny.NO_END))
        example = one(renderer, talk("ask", "say"))
        assert shown(renderer, example) == "user: ask\nassistant: [say\n]"
        assert not renderer.ends_in_stop(example)

    def test_date_is_fixed(self) -> None:
        renderer = Renderer(tiny.byte_level(False, tiny.DATED))
        assert "today 26 Jul 2024<|im_end|>" in shown(renderer, one(renderer, talk("ask", "say")))
        assert any("date" in note for note in renderer.notes)

    def test_missing_bos_is_noted_not_added(self) -> None:
        renderer = Renderer(tiny.byte_level(True, tiny.CHATML))
        assert one(renderer, talk("ask", "say")).input_ids[0] != renderer.tokens.bos
        assert any("does not begin with '<s>'" in note for note in renderer.notes)
        assert not Renderer(tiny.sentencepiece(tiny.LLAMA2)).notes

    def test_context_reaches_the_template(self) -> None:
        template = "{{ mood }}" + tiny.CHATML
        renderer = Renderer(tiny.byte_level(False, template))
        example = one(renderer, talk("ask", "say", context={"mood": "calm"}))
        assert shown(renderer, example).startswith("calm<|im_start|>")
        with pytest.raises(BadRow, match=r"'context' holds \['tools'\]"):
            renderer.encode(talk("ask", "say", context={"tools": []}))

    def test_unanswered_end(self) -> None:
        renderer = Renderer(tiny.byte_level(False, tiny.CHATML))
        example = one(renderer, talk("ask", "say", "more"))
        assert "more" not in shown(renderer, example)
        assert "left out" in example.note
        with pytest.raises(BadRow, match="no answer"):
            renderer.encode(talk("ask"))

    def test_stop_ids(self) -> None:
        tokenizer = tiny.byte_level(False, tiny.CHATML)
        end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
        renderer = Renderer(tokenizer, stop_ids=[77])
        assert renderer.stop_ids == tuple(sorted({end, eos, 77}))
        said = tokenizer("say", add_special_tokens=False)["input_ids"]
        assert renderer.decode([*said, end, *said]) == "say"
        assert reference(talk("ask", "say")) == "say" and reference(talk("ask")) == ""

    def test_pickle(self) -> None:
        renderer = Renderer(tiny.byte_level(False, tiny.CHATML))
        messages = talk("ask", "say")
        again = pickle.loads(pickle.dumps(renderer))
        assert (
            again.encode(messages)[0].input_ids.tolist()
            == one(renderer, messages).input_ids.tolist()
        )


class TestTooLong:
    def test_plain_keeps_bos_and_the_newest_text(self) -> None:
        renderer = Renderer(tiny.byte_level(), "none", length=10, source_length=4)
        example = one(renderer, talk("0123456789", "qwertyuiop"))
        assert shown(renderer, example) == "<s>789[qwerty]"
        assert example.cut == 7 + 5  # four letters of the answer and its EOS
        assert not renderer.ends_in_stop(example)
        assert renderer.prompt(talk("0123456789")) == example.input_ids[:4].tolist()

    def test_answer_that_just_fits_keeps_eos(self) -> None:
        renderer = Renderer(tiny.byte_level(), "none", length=8)
        assert shown(renderer, one(renderer, talk("012", "qwe"))) == "<s>012[qwe</s>]"
        example = one(renderer, talk("012", "qwer"))
        assert shown(renderer, example) == "<s>012[qwer]" and example.cut == 1

    def test_source_length_of_the_special_tokens_alone(self) -> None:
        renderer = Renderer(tiny.byte_level(), "none", length=8, source_length=1)
        assert shown(renderer, one(renderer, talk("012", "qwe"))) == "<s>[qwe</s>]"

    def test_no_room_for_an_answer(self) -> None:
        for source_length in (None, 9):
            renderer = Renderer(tiny.byte_level(), "none", 8, source_length)
            with pytest.raises(Dropped, match=r"no room for an answer \(data.length=8"):
                renderer.encode(talk("0123456789", "say"))

    def test_policies(self) -> None:
        for overlong, error in (("drop", Dropped), ("refuse", TooLong)):
            renderer = Renderer(tiny.byte_level(), "none", length=8, overlong=overlong)
            one(renderer, talk("012", "qwe"))
            for messages in (talk("012", "qwer"), FORMATS["text"]({"text": "0123456"})):
                with pytest.raises(error, match=r"data\.length=8"):
                    renderer.encode(messages)

    def test_text(self) -> None:
        rows = FORMATS["text"]({"text": "0123456789"})
        renderer = Renderer(tiny.byte_level(), "none", length=6)
        example = one(renderer, rows)
        assert shown(renderer, example) == "<s>[01234]" and example.cut == 6
        renderer = Renderer(tiny.byte_level(), "none", length=6, overlong="split")
        pieces = renderer.encode(rows)
        assert [shown(renderer, p) for p in pieces] == ["<s>[01234]", "<s>[56789]", "<s>[</s>]"]
        assert [p.cut for p in pieces] == [0, 0, 0]

    def test_text_split_leaves_no_lone_token(self) -> None:
        """Without BOS a last piece of one token would train nothing."""
        renderer = Renderer(tiny.byte_level(False), "none", length=5, overlong="split")
        pieces = renderer.encode(FORMATS["text"]({"text": "0123456789"}))
        assert [shown(renderer, p) for p in pieces] == ["0[1234]", "5[6789]"]
        assert sum(p.cut for p in pieces) == 1

    @pytest.mark.parametrize(
        ("tokenizer", "start"),
        [
            (tiny.byte_level(False, tiny.CHATML), "<|im_start|>system\nbe good<|im_end|>\n"),
            (tiny.sentencepiece(tiny.LLAMA2), "<s>[inst] <<be good>>"),
            (tiny.byte_level(True), "<s>be good\n"),
        ],
        ids=["chatml", "llama2", "plain"],
    )
    def test_whole_rounds_from_the_last_with_system(self, tokenizer: Any, start: str) -> None:
        texts = [letter * 20 for letter in "abcdefgh"]
        messages = talk(*texts, system="be good")
        whole = Renderer(tokenizer).encode(messages)[0]
        renderer = Renderer(tokenizer, length=len(whole.input_ids) - 2)
        example = one(renderer, messages)
        text = shown(renderer, example)
        assert text.startswith(start) and texts[0] not in text
        assert [t in text for t in texts[2:]] == [True] * 6
        shorter = Renderer(tokenizer).encode(messages[:1] + messages[3:])[0]
        assert example.input_ids.tolist() == shorter.input_ids.tolist()
        assert example.cut == len(whole.input_ids) - len(shorter.input_ids)

        half = Renderer(tokenizer).encode(messages[:5])[0]
        renderer = Renderer(tokenizer, length=len(half.input_ids), overlong="split")
        split = renderer.encode(messages)
        assert len(split) == 2 and all(p.cut == 0 for p in split)
        for piece, mine in zip(split, (texts[:4], texts[4:]), strict=True):
            text = shown(renderer, piece)
            assert text.startswith(start) and [t for t in texts if t in text] == mine

    def test_rewritten_history_keeps_rounds_too(self) -> None:
        tokenizer = tiny.byte_level(False, tiny.QWEN3)
        messages = talk(*[letter * 20 for letter in "abcdef"])
        whole = one(Renderer(tokenizer), messages)
        example = one(Renderer(tokenizer, length=len(whole.input_ids) - 2), messages)
        assert (
            example.input_ids.tolist() == one(Renderer(tokenizer), messages[2:]).input_ids.tolist()
        )

    def test_long_question_keeps_its_frame(self) -> None:
        renderer = Renderer(tiny.byte_level(False, tiny.CHATML), length=60, source_length=40)
        messages = talk("0123456789" * 8, "qwertyuiop" * 3, system="s")
        example = one(renderer, messages)
        frame = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        room = 40 - len(renderer.tokens(frame.format("")))
        question = ("0123456789" * 8)[-room:]
        assert shown(renderer, example) == frame.format(question) + "[qwertyuiopqwertyuiop]"
        assert example.cut == 80 - room + 10 + 1
        assert renderer.prompt(messages[:-1])[-40:] == renderer.prompt(messages)[-40:]

    def test_prompt_fits_and_reports_what_it_lost(self) -> None:
        for template, tokenizer in (
            ("none", tiny.byte_level()),
            ("auto", tiny.byte_level(False, tiny.CHATML)),
        ):
            renderer = Renderer(tokenizer, template, length=40)
            ids, cut = renderer.prompt_and_cut(talk("0123456789" * 8))
            whole = Renderer(tokenizer, template).prompt(talk("0123456789" * 8))
            assert len(ids) == 40 and cut == len(whole) - 40
        with pytest.raises(BadRow, match="template alone"):
            Renderer(tiny.byte_level(False, tiny.CHATML), length=4).prompt(talk("ask"))

    def test_split_leaves_out_what_cannot_be_cut(self) -> None:
        renderer = Renderer(tiny.byte_level(), "none", length=20, overlong="split")
        first, last = renderer.encode(talk("ask", "say", "0123456789" * 3, "more", "ask", "end"))
        assert shown(renderer, first) == "<s>ask[say</s>]"
        assert shown(renderer, last) == "<s>ask[end</s>]"
        assert first.cut == 1 + 30 + 4 + 1
        with pytest.raises(Dropped, match="no trained round of it fits"):
            renderer.encode(talk("0123456789" * 3, "say", "0123456789" * 3, "say"))

    def test_split_leaves_out_what_is_not_trained(self) -> None:
        renderer = Renderer(tiny.byte_level(), "none", length=8, overlong="split")
        messages = talk("ask", "say", "more", "end")
        messages[1] = Message("assistant", "say", False)
        assert [shown(renderer, e) for e in renderer.encode(messages[:2] + talk("as", "end"))] == [
            "<s>as[end</s>]"
        ]


PADDLE = {
    "system": "good {{mood}}\n",
    "conversation": ["Human: {{user}}</think>Bot:", "{{bot}}</s>\n"],
    "query": "Human: {{query}}</think>Bot:",
}


class TestPaddle:
    def write(self, folder: Path, value: Any) -> str:
        file = folder / "chat_template.json"
        file.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
        return str(file)

    def test_rounds(self, tmp_path: Path) -> None:
        renderer = Renderer(tiny.byte_level(), self.write(tmp_path, PADDLE))
        messages = talk("ask", "say", "more", "end", context={"mood": "calm"})
        example = one(renderer, messages)
        assert shown(renderer, example) == (
            "good calm\nHuman: ask</think>Bot:[say</s>\n]Human: more</think>Bot:[end</s>\n]"
        )
        prompt = renderer.prompt(messages[:-1])
        assert example.input_ids[: len(prompt)].tolist() == prompt
        check_supervision(renderer, messages, example)
        assert pickle.loads(pickle.dumps(renderer)).prompt(messages) == prompt

    def test_query_may_take_the_bots_first_words(self, tmp_path: Path) -> None:
        parts = {
            "conversation": ["[{{index}}] {{user}}\n", "Bot: {{bot}}</s>"],
            "query": "[{{index}}] {{query}}\nBot: ",
        }
        renderer = Renderer(tiny.byte_level(False), self.write(tmp_path, parts))
        example = one(renderer, talk("ask", "say", "more", "end"))
        text = renderer.tokens.decode(example.input_ids.tolist(), special=True)
        assert text == "[0] ask\nBot: say</s>[1] more\nBot: end</s>"
        check_supervision(renderer, talk("ask", "say", "more", "end"), example)

    def test_query_that_differs_is_refused(self, tmp_path: Path) -> None:
        file = self.write(tmp_path, PADDLE | {"system": "", "query": "Q: {{query}}"})
        with pytest.raises(Refused, match="`query`"):
            Renderer(tiny.byte_level(), file).encode(talk("ask", "say"))

    def test_missing_context(self, tmp_path: Path) -> None:
        renderer = Renderer(tiny.byte_level(), self.write(tmp_path, PADDLE))
        with pytest.raises(BadRow, match=r"'mood' is undefined.*'context'"):
            renderer.encode(talk("ask", "say"))
        system = "{% if mood %}good {{mood}}{% else %}plain {% endif %}"
        renderer = Renderer(tiny.byte_level(), self.write(tmp_path, PADDLE | {"system": system}))
        assert shown(renderer, one(renderer, talk("ask", "say"))).startswith("plain Human")

    def test_lost_system(self, tmp_path: Path) -> None:
        renderer = Renderer(tiny.byte_level(), self.write(tmp_path, PADDLE | {"system": "fixed"}))
        with pytest.raises(Refused, match="drops the system message"):
            renderer.encode(talk("ask", "say", system="be good"))
        parts = PADDLE | {"system": "{{system}};"}
        renderer = Renderer(tiny.byte_level(), self.write(tmp_path, parts))
        text = shown(renderer, one(renderer, talk("ask", "say", system="be good")))
        assert text.startswith("be good;Human: ask")

    def test_no_end_of_turn(self, tmp_path: Path) -> None:
        parts = PADDLE | {"system": "", "conversation": [PADDLE["conversation"][0], "{{bot}}\n"]}
        renderer = Renderer(tiny.byte_level(), self.write(tmp_path, parts))
        assert not renderer.ends_in_stop(one(renderer, talk("ask", "say")))

    @pytest.mark.parametrize(
        ("value", "found"),
        [
            ("{", "cannot be read"),
            ({"conversation": ["a"]}, "no chat template"),
            ({"system": "s"}, "no chat template"),
            ([1], "no chat template"),
            (PADDLE | {"query": "{{"}, "unexpected"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, value: Any, found: str) -> None:
        with pytest.raises(Refused, match=found):
            Renderer(tiny.byte_level(), self.write(tmp_path, value))

    @pytest.mark.skipif(not SAMPLES.is_dir(), reason="LUTHIER_CONFIGS holds no PaddleNLP samples")
    def test_the_suites_own_files(self) -> None:
        renderer = Renderer(tiny.byte_level(), str(SAMPLES / "chat_template.json"))
        text = shown(renderer, one(renderer, talk("ask", "say", "more", "end")))
        assert text == (
            "你是一个人工智能助手\nHuman: ask<sep> Bot:[say\n]Human: more<sep> Bot:[end\n]"
        )
        renderer = Renderer(tiny.byte_level(), str(SAMPLES / "chat_template_with_context.json"))
        context = {"system": "one", "instruction": "two"}
        prompt = renderer.prompt(
            FORMATS["src_tgt"]({"src": "ask", "tgt": "say", "context": context})
        )
        assert renderer.decode(prompt) == "你是一个人工智能助手one-two\nHuman: ask<sep> Bot:"

    def test_other_files(self, tmp_path: Path) -> None:
        file = tmp_path / "t.jinja"
        file.write_text(tiny.CHATML, "utf-8")
        want = one(Renderer(tiny.byte_level(False, tiny.CHATML)), talk("ask", "say"))
        for name in (str(file), self.write(tmp_path, {"chat_template": tiny.CHATML})):
            got = one(Renderer(tiny.byte_level(False), name), talk("ask", "say"))
            assert got.input_ids.tolist() == want.input_ids.tolist()
        file.write_text("{% for %}", "utf-8")
        with pytest.raises(Refused, match="line 1"):
            Renderer(tiny.byte_level(), str(file))
        with pytest.raises(Refused, match="No such file"):
            Renderer(tiny.byte_level(), str(tmp_path / "absent.jinja"))


class TestChecks:
    ids = np.array([[5, 6, 7, 8, 9, 0, 0]])
    documents = np.array([[0, 0, 0, 1, 1, PADDING, PADDING]])
    labels = np.array([[IGNORE, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]])

    def test_good(self) -> None:
        check_labels(self.ids, self.labels, self.documents)
        check_labels(*(torch.from_numpy(a) for a in (self.ids, self.labels, self.documents)))

    @pytest.mark.parametrize(("column", "label"), [(0, 7), (1, 6), (2, 8), (4, 0), (5, 0)], ids=str)
    def test_bad(self, column: int, label: int) -> None:
        labels = self.labels.copy()
        labels[0, column] = label
        with pytest.raises(Failed, match=f"row 0 at token {column}: label {label}"):
            check_labels(self.ids, labels, self.documents)

    def test_labels_shifted_once_too_often(self) -> None:
        example = one(Renderer(tiny.byte_level(), "none"), talk("ask", "say"))
        shifted = np.append(example.labels[1:], IGNORE)
        with pytest.raises(Failed, match="not the next token"):
            check_labels(example.input_ids, shifted)

    def test_prompt_trained(self) -> None:
        renderer = Renderer(tiny.byte_level(False, tiny.CHATML))
        messages = talk("ask", "say", "more", "end")
        example = one(renderer, messages)
        check_supervision(renderer, messages, example)
        labels = np.append(example.input_ids[1:], IGNORE)
        with pytest.raises(Failed, match=r"begin at tokens \[0\]"):
            check_supervision(renderer, messages, Example(example.input_ids, labels))
        ids = example.input_ids.copy()
        ids[3] += 1
        with pytest.raises(Failed, match="differs from the one used in prediction"):
            check_supervision(renderer, messages, Example(ids, example.labels))

    def test_eos_untrained(self) -> None:
        renderer = Renderer(tiny.byte_level(), "none")
        example = one(renderer, talk("ask", "say"))
        assert renderer.ends_in_stop(example)
        labels = example.labels.copy()
        labels[-2] = IGNORE
        assert not renderer.ends_in_stop(Example(example.input_ids, labels))


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


WAYS = {
    "GPT-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "SmolLM2": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    **{f"Split {i}": [_split(each)] for i, each in enumerate(sorted(SPLITS))},
}


class TestTheShortWayToIds:
    """`Tokens` asks the Rust tokenizer itself where transformers would add nothing."""

    TEXTS = ("", "a", "\nA b", "ab " * 30, "x</s>y <|im_end|>\n" + "ab\n\nA" * 9, "é你" * 9)

    def plainly(self, tokenizer: Any, text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def test_same_ids_as_a_call(self) -> None:
        for tokenizer in (tiny.byte_level(), tiny.sentencepiece()):
            tokens = Tokens(tokenizer)
            assert is_plain(tokenizer)
            for text in (*self.TEXTS, *self.TEXTS):  # the second time short ones are remembered
                assert tokens(text) == self.plainly(tokenizer, text)

    @pytest.mark.parametrize(
        ("change", "apart"),
        [
            ("nothing", True),
            ("digits", True),
            ("blanks", False),
            ("prefix", False),
            ("normalizer", True),
            ("normalized", False),
        ],
    )
    def test_pieces_between_special_tokens(self, change: str, apart: bool) -> None:
        """They are encoded one by one only where that cannot matter; the ids are those of the whole text."""
        tokenizer = copy.deepcopy(tiny.byte_level())
        core = tokenizer.backend_tokenizer
        match change:
            case "digits":
                steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
                core.pre_tokenizer = pre_tokenizers.Sequence(steps)
            case "blanks":
                core.add_special_tokens([AddedToken("<x>", lstrip=True, normalized=False)])
            case "prefix":
                core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
            case "normalizer":
                core.normalizer = normalizers.Prepend(" ")
            case "normalized":
                core.normalizer = normalizers.Lowercase()
                core.add_tokens([AddedToken("<x>", normalized=True)])
        assert (borders(tokenizer) is not None) == apart
        tokens = Tokens(tokenizer)
        for text in (
            *self.TEXTS,
            "a  <x> b",
            "a<X>",
            "a1</s>\n",
            "<|im_end|><|im_end|>",
            "<|im_end",
        ):
            assert tokens(text) == self.plainly(tokenizer, text)

    @pytest.mark.parametrize("way", WAYS)
    def test_words_are_encoded_one_by_one(self, way: str) -> None:
        """Over texts made of all that may stand around a blank; the second time the words are known."""
        tokenizer = copy.deepcopy(tiny.byte_level())
        steps = WAYS[way]
        if way.startswith("Split"):
            steps = [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        assert has_words(tokenizer)
        tokens, draw = Tokens(tokenizer), random.Random(0)
        pieces = [
            " ",
            " ",
            "  ",
            "\n",
            " \n",
            "\t",
            "\r\n",
            "\x1c",
            "\u3000",
            "a",
            "ab",
            "A",
            "b",
            "1",
            "23",
        ]
        pieces += ["'s", "'S", "'", ".", "...", "é", "e\u0301", "你", "<s>", "_", "\u200b"]
        for _ in range(400):
            text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
            assert tokens(text) == self.plainly(tokenizer, text), repr(text)
        assert tokens._known_words

    def test_an_added_token_is_no_words(self) -> None:
        tokenizer = copy.deepcopy(tiny.byte_level())
        tokenizer.add_special_tokens({"additional_special_tokens": ["<end of turn>"]})
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokens = Tokens(tokenizer)
        assert tokens._words
        text = "a b<end of turn>b a"
        assert tokens(text) == self.plainly(tokenizer, text)

    def test_paragraphs_without_blanks_are_not_remembered(self) -> None:
        tokenizer = copy.deepcopy(tiny.byte_level())
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokens = Tokens(tokenizer)
        text = "你" * 60 + " b " + "你" * 300
        for _ in range(2):
            assert tokens(text + " " + text) == self.plainly(tokenizer, text + " " + text)
        assert " b" in tokens._known_words
        assert max(map(len, tokens._known_words)) <= LONG

    def test_words_without_ids(self) -> None:
        """A byte that no token stands for has none."""
        core = Tokenizer(models.BPE(vocab={"a": 0, "Ġ": 1}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>")
        tokens = Tokens(tokenizer)
        assert tokens._words
        for text in ("x a", "x a a", "x"):
            assert tokens(text) == self.plainly(tokenizer, text)

    def test_other_ways_have_no_words(self) -> None:
        for step in (_split(" a+"), pre_tokenizers.ByteLevel(False, use_regex=False)):
            tokenizer = copy.deepcopy(tiny.byte_level())
            tokenizer.backend_tokenizer.pre_tokenizer = step
            assert not has_words(tokenizer)

    def test_a_template_renders_as_transformers_renders_it(self) -> None:
        names = ("CHATML", "LLAMA2", "PHI3", "QWEN3", "R1", "MARKED", "DATED")
        talked = [{"role": "user", "content": " a\n<b>& "}, {"role": "assistant", "content": "c "}]
        for name in names:
            tokenizer = tiny.byte_level(True, getattr(tiny, name))
            template = Jinja(Tokens(tokenizer), tokenizer.chat_template, 99, None)
            for messages in (talked[:1], talked, [{"role": "system", "content": "s"}, *talked]):
                for asked in (True, False):
                    wanted = tokenizer.apply_chat_template(
                        messages,
                        chat_template=template.source,
                        add_generation_prompt=asked,
                        tokenize=False,
                    )
                    assert template._text(messages, asked) == wanted, name

    def test_what_is_remembered_cannot_be_changed_from_outside(self) -> None:
        tokens = Tokens(tiny.byte_level())
        tokens("ab").append(7)
        assert tokens("ab") == self.plainly(tiny.byte_level(), "ab")

    def test_a_batch_call_elsewhere_does_not_pad_or_cut(self) -> None:
        tokenizer = copy.deepcopy(tiny.byte_level())
        tokens, text = Tokens(tokenizer), "ab " * 30
        expected = self.plainly(tokenizer, text)
        tokenizer([text], padding="max_length", truncation=True, max_length=8)
        assert tokens(text) == expected
        tokenizer(["a"], padding="max_length", max_length=200)
        assert tokens(text) == expected

    def test_a_class_with_a_way_of_its_own_is_called(self) -> None:
        class Own(PreTrainedTokenizerFast):
            def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
                found = super()._encode_plus(*args, **kwargs)
                found["input_ids"] = [7, *found["input_ids"]]
                return found

        own = Own(tokenizer_object=tiny.byte_level().backend_tokenizer, eos_token="</s>")
        assert not is_plain(own)
        assert Tokens(own)("ab ab ab ab")[0] == 7
