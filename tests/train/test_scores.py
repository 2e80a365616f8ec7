"""BLEU and ROUGE: the tokeniser, values worked out by hand, PaddleNLP's golden values, empty input."""

from __future__ import annotations

import math

import pytest

from luthier.train.scores import character_scores, text_scores, tokenise

NAMES = {"bleu4", "rouge1", "rouge2", "rougel"}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The cat, it's 3.5!", ["The", "cat", ",", "it", "'", "s", "3", ".", "5", "!"]),
        ("裙身采用v领，好看。", ["裙", "身", "采", "用", "v", "领", "，", "好", "看", "。"]),
        ("カタkana ひら 𠀀x", ["カ", "タ", "kana", "ひ", "ら", "𠀀", "x"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("हिन्दी naïve", ["हिन्दी", "naïve"]),  # vowel signs belong to their word
        ("f(a_b)\u3000\x1f\u00a0\n=", ["f", "(", "a_b", ")", "="]),
        ("", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokenise(text) == tokens


def test_values_by_hand() -> None:
    # 6 tokens each, 5 unigrams, 3 of 5 bigrams, 2 of 4 trigrams, 1 of 3 fourgrams shared
    found = text_scores(["the cat sat on the mat"], ["the cat is on the mat"])
    assert found["rouge1"] == pytest.approx(5 / 6)
    assert found["rouge2"] == pytest.approx(3 / 5)
    assert found["rougel"] == pytest.approx(5 / 6)
    # trigrams: only "on the mat"; fourgrams: none, smoothed to 1 / (2 * 3)
    assert found["bleu4"] == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)


def test_chinese_counts_characters() -> None:
    found = text_scores(["今天天气好"], ["今天天气很好"])
    assert found["rouge1"] == pytest.approx(2 * 5 / 11)
    assert found["rouge2"] == pytest.approx(2 * 3 / 9)
    assert found["bleu4"] == pytest.approx(
        math.exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    )


def test_corpus_and_mean() -> None:
    """BLEU pools counts over the corpus, ROUGE is the mean over rows."""
    found = text_scores(["a b c d", "x"], ["a b c d", "p q r s"])
    assert found["rouge1"] == found["rougel"] == 0.5
    assert found["bleu4"] == pytest.approx(math.exp(1 - 8 / 5) * (4 / 5) ** 0.25)


def test_bounds() -> None:
    assert text_scores(["yes", "no"], ["yes", "no"]) == dict.fromkeys(NAMES - {"rouge2"}, 1.0) | {
        "rouge2": 0.0  # one word has no bigram
    }
    assert set(text_scores(["a b"], ["c d"]).values()) == {0.0}


@pytest.mark.parametrize("score", [text_scores, character_scores])
@pytest.mark.parametrize("pair", [([], []), ([""], ["a"]), (["a"], [""]), ([""], [""])])
def test_empty_scores_nothing(score, pair) -> None:
    found = score(*pair)
    assert set(found) == NAMES
    assert all(value < 1e-70 for value in found.values())  # character BLEU: a stand-in for zero


@pytest.mark.parametrize("score", [text_scores, character_scores])
def test_one_reference_for_each_prediction(score) -> None:
    with pytest.raises(ValueError, match="zip"):
        score(["a", "b"], ["a"])


PAIRS = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("裙身处采用立体蝴蝶结装饰", "裙身采用立体的蝴蝶结来装饰"),
    ("abc", "abcdefgh"),
    ("aaaa", "aa"),
    ("hello", "hello"),
]
GOLDEN = [  # of PaddleNLP 3.0.0b4's own metric classes: rouge1, rouge2, rougel, bleu4
    (0.9090909091, 0.8125, 0.9341500766, 0.7839204411),
    (0.8461538462, 0.5833333333, 0.8736979167, 0.3435640218),
    (0.375, 0.2857142857, 0.5041322314, 2.3068e-78),
    (1.0, 1.0, 0.7093023256, 9.531e-155),
    (1.0, 1.0, 1.0, 1.0),
]


@pytest.mark.parametrize(("pair", "wanted"), [*zip(PAIRS, GOLDEN, strict=True)])
def test_golden_characters(pair, wanted) -> None:
    found = character_scores([pair[0]], [pair[1]])
    # the table holds ten digits; the two tiny ones five and four
    assert [found[n] for n in ("rouge1", "rouge2", "rougel")] == pytest.approx(
        wanted[:3], abs=1e-10
    )
    assert found["bleu4"] == pytest.approx(wanted[3], rel=5e-5, abs=0)


def test_golden_characters_together() -> None:
    found = character_scores(*zip(*PAIRS, strict=True))
    wanted = {
        "rouge1": 0.7837837838,
        "rouge2": 0.675,
        "rougel": 0.8042565100,
        "bleu4": 0.6361316876,
    }
    assert found == pytest.approx(wanted, abs=1e-10)
