"""F1 and exact match against the published rules of SQuAD's evaluation."""

import pytest

from ds_zoadamu.tasks.answers import exact_match, f1, normalized


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Cat, a dog & an owl!", "cat dog owl"),  # articles, punctuation
        ("  New\tYork \n", "new york"),
        ("theatre anthem", "theatre anthem"),  # articles are whole words
        ("U.S.A.", "usa"),
        ("the", ""),
        ("a-b", "ab"),  # punctuation goes without a space in its place
        ("the-end", "theend"),
        ("caf\u00e9 \u2014 the \u201cend\u201d", "caf\u00e9 \u2014 \u201cend\u201d"),  # ASCII punctuation only
        ("", ""),
    ],
)
def test_normalization(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    "prediction, golds, em, score",
    [
        ("The Denver Broncos.", ["Denver Broncos"], 1, 1),
        ("Denver", ["Denver Broncos"], 0, 2 / 3),  # precision 1, recall 1/2
        ("the Denver team of Colorado", ["Denver Broncos", "a team of Denver"], 0, 6 / 7),  # the better of both: 3/4 and 1
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as it stands there
        ("cat dog", ["dog cat"], 0, 1),  # order does not matter to F1
        ("two", ["three", "two"], 1, 1),
        ("", ["cat"], 0, 0),
        ("the", ["cat"], 0, 0),
        ("", ["a"], 1, 1),  # nothing is left of either, the rule of SQuAD 2.0
        ("", [""], 1, 1),
        ("cat", ["the"], 0, 0),
        ("10,000", ["10000"], 1, 1),
        ("no", ["yes"], 0, 0),
    ],
)
def test_scores(prediction, golds, em, score):
    assert exact_match(prediction, golds) == em
    assert f1(prediction, golds) == pytest.approx(score, abs=1e-12)
