"""Texts filled into a skeleton are those of the template, and a template that looks at a message has none."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import tiny_tokenizers as tiny

from luthier.data.formats import BadRow
from luthier.data.jinja import Jinja, _Pieces
from luthier.data.tokens import Tokens
from luthier.errors import Refused

LOOP = "{%% for m in messages %%}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
# prints every message in one way, whatever is in it
BLIND = {
    "chatml": tiny.CHATML,
    "generation": tiny.MARKED,
    "llama2": tiny.LLAMA2,
    "trimmed": LOOP % "{{ m.content | trim }}",
    "joined": LOOP % "{{ '' + m['content'] + '' }}",
    "counted": LOOP % "{% if loop.index0 == messages|length - 1 %}{{ m.content }}{% else %}{{ m.content }}{% endif %}",
    "alternating": LOOP % "{% if loop.index0 % 2 == 9 %}{{ raise_exception('no') }}{% endif %}{{ m.content }}",
    "role in a list": LOOP % "{% if m.role in ['user', 'system'] %}{{ m.content }}{% else %}{{ m.content | trim }}{% endif %}",
    "kept in a name": "{% set ns = namespace(last='') %}" + LOOP % "{% set ns.last = m.content %}{{ ns.last }}",
    "kind": LOOP % "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}",
    "present": LOOP % "{% if m.content and m.tools is not defined %}{{ m.content }}{% endif %}",
    "default": LOOP % "{{ m.content | default('none') }}",
    "role in a name": "{% set known = ['user', 'tool'] %}" + LOOP % "{{ m.content }}{% if m.role in known and m.role not in known[1:] %}!{% endif %}",
    "in another branch": LOOP % "{{ m.content }}{% if tools %}{% if m.content in tools %}!{% endif %}{{ tools | tojson }}{% endif %}",
    "called beside names": LOOP % "{% set t = m.content %}{% set role = m.role.strip('x') %}{{ t }}",
    "head": "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + LOOP % "{{ m.content }}",
}  # fmt: skip
# asks a message something that is mostly not so
ASKING = {
    "holds": LOOP % "{{ m.content }}{% if 'x' in m.content %}!{% endif %}",
    "begins": LOOP % "{{ m.content }}{% if m.content.startswith('x') %}!{% endif %}",
    "trimmed of x": LOOP % "{{ m.content | trim('x') }}",
    "ends": LOOP % "{{ m.content }}{% if m.content.endswith('b') %}!{% endif %}",
    "holds, stripped": LOOP % "{% set t = m.content | trim %}{{ t }}{% if '\\n' in t %}!{% endif %}",
    "left": LOOP % "{{ m.content.lstrip('\\n ') }}",
    "right": LOOP % "{{ m.content.rstrip() }}",
    "only when it holds": LOOP % "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}",
}  # fmt: skip
# does something that depends on a message, or could without being seen
LOOKING = {
    "thinking": tiny.QWEN3,
    "part of it": LOOP % "{{ m.content.split('x')[-1] }}",
    "letters": LOOP % "{% for c in m.content %}{{ c }}{% endfor %}",
    "first letter": LOOP % "{{ m.content[0] }}{{ m.content[1:] }}",
    "lies in": LOOP % "{{ m.content }}{% if m.content in 'x y z' %}!{% endif %}",
    "lies in a chain": LOOP % "{{ m.content }}{% if 'x' in m in 'xyz' %}!{% endif %}",
    "called block": "{% macro p() %}{{ caller() }}{% endmacro %}" + LOOP % "{% call p() %}{{ m.content }}{% endcall %}",
    "is": LOOP % "{{ m.content }}{% if m.content == 'x' %}!{% endif %}",
    "one of": LOOP % "{{ m.content }}{% if m.content in ['x', 'yes'] %}!{% endif %}",
    "long": LOOP % "{{ m.content }}{% if m.content | length > 3 %}!{% endif %}",
    "quoted": LOOP % "{{ m.content | tojson }}",
    "upper": LOOP % "{{ m.content | upper }}{{ m.content }}",
    "replaced": LOOP % "{{ m.content | replace('x', 'y') }}",
    "stripped with a border": LOOP % "{{ (' ' + m.content).strip() }}",
    "formatted": LOOP % "{{ '%s' % m.content }}",
    "formatted pair": LOOP % "{{ '%s%s' % (m.role, m.content) }}",
    "format": LOOP % "{{ '{}'.format(m.content) }}",
    "block": LOOP % "{% set t %}{{ m.content }}{% endset %}{{ t }}{% if 'x' in t %}!{% endif %}",
    "macro": "{% macro p(t) %}{{ t }}{% endmacro %}" + LOOP % "{{ p(m.content) }}",
    "tilde": LOOP % "{% set t = m.content ~ '' %}{{ t }}{% if 'x' in t %}!{% endif %}",
    "filter block": LOOP % "{% filter upper %}{{ m.content }}{% endfilter %}{{ m.content }}",
    "mapped": LOOP % "{{ m.content }}" + "{% if 'x' in messages | map(attribute='content') %}!{% endif %}",
    "turned": LOOP % "{{ m.content }}" + "{% if 'x' in (messages | reverse | map(attribute='content') | join) %}!{% endif %}",
    "holds, joined": LOOP % "{% set t = 'y' + m.content %}{{ t }}{% if 'yx' in t %}!{% endif %}",
    "holds the other": LOOP % "{{ m.content }}{% if messages[0].content in m.content %}!{% endif %}",
    "begins with one of": LOOP % "{{ m.content }}{% if m.content.startswith(('x', 'y')) %}!{% endif %}",
    "key": LOOP % "{{ m.content }}{{ {'x': '!'}.get(m.content, '') }}",
    "twice": LOOP % "{{ m.content }}{% if m.content * 2 == 'xx' %}!{% endif %}",
    "whole message": LOOP % "{{ m.content }}{% if m == {'role': 'user', 'content': 'x'} %}!{% endif %}",
    "printed": LOOP % "{{ m.content }}" + "{{ messages }}",
    "blank": LOOP % "{{ m.content }}{% if m.content | trim %}!{% endif %}",
}  # fmt: skip


def conversations() -> Iterator[list[dict[str, str]]]:
    """One to three turns, with a system message or not, answered or not; texts with blanks, marks and tokens."""
    chance = random.Random(0)
    texts = [
        "x",
        "yes",
        "  x\n",
        "a </think> b",
        "<|im_end|>",
        "two\nlines",
        "[inst]",
        "{{ m }}",
        "x y",
    ]
    for turns, system, answered in itertools.product((1, 2, 3), (False, True), (False, True)):
        roles = ["system"] * system + ["user", "assistant"] * turns
        for _ in range(8):
            yield [
                {"role": role, "content": chance.choice(texts)}
                for role in roles[: len(roles) - (not answered)]
            ]


def outcome(template: Jinja, messages: list[dict[str, str]]) -> _Pieces | str:
    """What a template makes of a conversation without a skeleton, or its error."""
    try:
        return template._pieces(messages, template._text)
    except (BadRow, Refused) as error:
        return str(error)


def made(source: str) -> Jinja:
    tokenizer = tiny.byte_level(True, source)
    return Jinja(Tokens(tokenizer), source, 999, None)


def filled(source: str) -> tuple[int, int]:
    """How many conversations were filled in, each checked, and how many were left to the template."""
    template, counts = made(source), [0, 0]
    for messages in conversations():
        found = template._filled(messages)
        counts[found is None] += 1
        assert found is None or found == outcome(template, messages), messages
    return counts[0], counts[1]


@pytest.mark.parametrize("name", BLIND)
def test_filled_texts_are_the_template_s(name: str) -> None:
    assert filled(BLIND[name])[0] > 90


@pytest.mark.parametrize("name", ASKING)
def test_a_template_that_asks_has_one_for_those_who_say_no(name: str) -> None:
    yes, no = filled(ASKING[name])
    assert yes > 5 and no > 5


@pytest.mark.parametrize("name", LOOKING)
def test_a_template_that_looks_has_no_skeleton(name: str) -> None:
    """But for conversations in which it does not: this form of thinking is looked at in answers only."""
    assert filled(LOOKING[name])[0] == 0 or name == "thinking"


def test_an_answer_may_end_like_the_text_behind_it() -> None:
    """The line end behind the answer is the template's; where nothing stands between, it is the answer's own."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if loop.length < 3 or not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = made(source)
    messages = [{"role": r, "content": "a\n"} for r in ("system", "user", "assistant")]
    whole = outcome(template, messages)
    assert isinstance(whole, _Pieces) and whole.rounds[-1][1] == "a"  # without its own line end
    assert template._filled(messages) is None
    assert template._filled(messages[1:]) == outcome(template, messages[1:])


def test_an_empty_message_is_rendered() -> None:
    template = made(LOOP % "{% if m.content %}{{ m.content }}{% else %}none{% endif %}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert template._filled(messages) == outcome(template, messages)
    assert template._filled([{"role": "user", "content": ""}, messages[1]]) is None


def test_rows_take_the_skeleton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The template itself runs for the first conversation of a shape alone, to prove the skeleton."""
    template, runs = made(tiny.CHATML), []
    plain = Jinja._text
    monkeypatch.setattr(Jinja, "_text", lambda *args: runs.append(1) or plain(*args))
    for text in ("a", "b", "c"):
        pair = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        assert template._filled(pair) is not None
    assert len(runs) == 2  # a prompt and an answer


def test_a_skeleton_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if transformers began to render a template in another way."""
    template, plain = made(tiny.CHATML), Jinja._text
    monkeypatch.setattr(Jinja, "_text", lambda *args: plain(*args).replace("user", "human"))
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert template._filled(pair) is None
