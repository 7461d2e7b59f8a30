"""Exact match and F1 of a generated answer, by the rules that SQuAD's evaluation is published with.

Source: the evaluation scripts of SQuAD 1.1 (Rajpurkar et al. 2016) and 2.0 (2018). They say the same but where an answer has no
words left: 2.0, which is followed here, gives F1 as 1 if both have none and 0 if one has.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, then without articles, and one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the answer is one of the right ones once both are normalized."""
    return float(normalized(prediction) in map(normalized, golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, with the right answer for which it is highest."""
    return max(_f1(normalized(prediction).split(), normalized(gold).split()) for gold in golds)


def _f1(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    same = sum((Counter(prediction) & Counter(gold)).values())
    return 2.0 * same / (len(prediction) + len(gold))  # 2 p r / (p + r), with p and r over the two lengths
