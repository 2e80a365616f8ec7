"""BLEU-4 and ROUGE-1/2/L of generated answers against references, on a scale of 0 to 1.

`text_scores` is Luthier's own measure: sacrebleu and rouge-score over the words of `tokenise`, which
handles Chinese and Japanese. `character_scores` is PaddleNLP's measure, for comparing with its published
numbers. Who generates the answers is `evaluate.py`.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

# Scripts written without spaces between words: each character is a token. First and last code point.
UNSPACED = (
    (0x3005, 0x3007),  # iteration and closing marks, zero
    (0x3040, 0x30FF),  # hiragana, katakana
    (0x3100, 0x312F),  # bopomofo
    (0x31F0, 0x31FF),  # small katakana
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0xFF66, 0xFF9D),  # halfwidth katakana
    (0x20000, 0x3FFFF),  # Han, extensions B and later
)


def tokenise(text: str) -> list[str]:
    """Words of `text`, the unit of both BLEU and ROUGE here.

    A run of letters, marks, digits and underscores is one token; a Chinese or Japanese character is one
    token; any other visible character (punctuation, symbol) is one token; white space only separates.
    Case is kept, nothing is stemmed or left out.
    """
    tokens: list[str] = []
    in_word = False
    for char in text:
        if any(first <= ord(char) <= last for first, last in UNSPACED):
            tokens.append(char)
            in_word = False
        elif char == "_" or unicodedata.category(char)[0] in "LMN":
            if in_word:
                tokens[-1] += char
            else:
                tokens.append(char)
            in_word = True
        else:
            if not char.isspace():
                tokens.append(char)
            in_word = False
    return tokens


class _Words:
    """The tokeniser object that rouge-score asks for. It is handed texts split already."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`bleu4`, `rouge1`, `rouge2` and `rougel`, each in 0..1; all 0 when there are no rows.

    `bleu4` is sacrebleu's corpus BLEU over the tokens of `tokenise`: n-grams up to 4, exponential
    smoothing of orders without a match, brevity penalty; orders longer than every prediction are left out,
    so that a perfect corpus of one-word answers scores 1. (Papineni et al. 2002; Post 2018.)
    `rouge1/2/l` are the mean over rows of rouge-score's F1 over the same tokens; rougeL takes each
    text as one sequence. (Lin 2004.) A row whose prediction or reference is empty scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    outputs = [" ".join(tokenise(text)) for text in predictions]
    targets = [" ".join(tokenise(text)) for text in references]
    pairs = list(zip(outputs, targets, strict=True))
    if not pairs:
        return dict.fromkeys(("bleu4", "rouge1", "rouge2", "rougel"), 0.0)
    # force: the text is tokenised already, which sacrebleu would remark on
    bleu = BLEU(tokenize="none", force=True, effective_order=True)
    # sacrebleu's exponential of logarithms may end a rounding above 100
    scores = {"bleu4": min(bleu.corpus_score(outputs, [targets]).score / 100, 1.0)}
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=_Words())
    rows = [scorer.score(target, output) for output, target in pairs]
    for name in names:
        scores[name.lower()] = math.fsum(row[name].fmeasure for row in rows) / len(rows)
    return scores


def character_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """PaddleNLP's `bleu4`, `rouge1`, `rouge2`, `rougel`: over characters, case and spaces kept, 0..1.

    ROUGE-N is the corpus recall of n-gram *sets*; ROUGE-L the mean over rows of the F score with
    beta = 1.2 on the longest common subsequence; BLEU-4 is unsmoothed, a precision of zero being replaced
    by the smallest positive float. Where PaddleNLP divides by zero (all texts empty), the score is 0.
    """
    pairs = list(zip(predictions, references, strict=True))
    scores = {}
    for n in (1, 2):
        grams = [(set(_grams(output, n)), set(_grams(target, n))) for output, target in pairs]
        total = sum(len(target) for _, target in grams)
        found = sum(len(output & target) for output, target in grams)
        scores[f"rouge{n}"] = found / total if total else 0.0
    scores["rougel"] = sum(_f_longest(*pair) for pair in pairs) / len(pairs) if pairs else 0.0
    scores["bleu4"] = _character_bleu(pairs)
    return scores


def _grams(text: str, n: int) -> list[str]:
    return [text[i : i + n] for i in range(len(text) - n + 1)]


def _f_longest(output: str, target: str, beta: float = 1.2) -> float:
    """F score of the longest common subsequence."""
    longest = [0] * (len(target) + 1)  # of the output so far and each prefix of the target
    for char in output:
        diagonal = 0
        for j, other in enumerate(target, start=1):
            above = longest[j]
            longest[j] = diagonal + 1 if char == other else max(above, longest[j - 1])
            diagonal = above
    if not longest[-1]:
        return 0.0
    precision, recall = longest[-1] / len(output), longest[-1] / len(target)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _character_bleu(pairs: list[tuple[str, str]]) -> float:
    produced, wanted = sum(len(o) for o, _ in pairs), sum(len(t) for _, t in pairs)
    if not produced:
        return 0.0
    log_precision = 0.0
    for n in range(1, 5):
        grams = [
            (Counter(_grams(output, n)), Counter(_grams(target, n))) for output, target in pairs
        ]
        total = sum(output.total() for output, _ in grams)
        found = sum((output & target).total() for output, target in grams)
        # 2.2e-308, PaddleNLP's stand-in for zero
        log_precision += math.log(found / total if found else 2.2250738585072014e-308) / 4
    return math.exp(log_precision + min(1 - wanted / produced, 0))
