"""The package's tasks, for rows with the hub's columns: prompt, options, tokens and what is right, written out by hand."""

import json
from dataclasses import replace

import pytest

from ds_zoadamu.tasks import TASKS, GenerationTask, InputError, PromptTask
from tests.helpers.hub_rows import BY_HAND, texts, write_task
from tests.helpers.tiny_kinds import MASKED_BY_HAND
from tests.helpers.tokenizers_of_tests import llama_like, opt_like, roberta_like

TOKENIZERS = {"opt": opt_like(texts()), "llama": llama_like(texts()), "roberta": roberta_like(texts())}
CASES = [(name, number) for name, every in BY_HAND.items() for number in range(len(every))]
PIECES = {  # of the options, with the space before a word as the tokenizer writes it
    "sst2": [["_terrible"], ["_great"]],
    "rte": [["Yes"], ["No"]],
    "cb": [["Yes"], ["No"], ["Maybe"]],
    "boolq": [["Yes"], ["No"]],
    "wsc": [["No"], ["Yes"]],
    "wic": [["No"], ["Yes"]],
    "multirc": [["No"], ["Yes"]],
    "copa": [["_he", "_got", "_a", "_hole", "."], ["_he", "_dropped", "_a", "_hammer", "."]],
    "record": [
        ["_The", "_race", "_was", "_won", "_by", who, ",", "_who", "_is", "_fast", "."] for who in ("_Bob", "_Ann", "_Rome")
    ],
    "squad": [["_Rome", "\n"]],
    "drop": [["_4", "\n"]],
}  # fmt: skip


def one_row(task, row, folder):
    (folder / "validation.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = TASKS[task].rows("validation", str(folder))
    return found


def encoded(task, row, tokenizer, **limits):
    """(context, candidates, what is right)"""
    example = TASKS[task].bind(tokenizer, None, **limits).encode(row)
    if isinstance(TASKS[task], PromptTask):
        return example.context, example.candidates, (example.label,)
    if isinstance(TASKS[task], GenerationTask):
        return example.context, (example.answer,), example.golds
    return example.context, example.candidates, example.right


def test_every_task_has_rows():
    assert set(BY_HAND) == set(PIECES)
    assert set(BY_HAND) | set(MASKED_BY_HAND) == set(TASKS) - {"text", "chat", "lengths"}


@pytest.mark.parametrize("name, number", CASES)
def test_a_row_is_asked_as_the_paper_does(name, number, tmp_path):
    row, prompt, options, right = BY_HAND[name][number]
    found = one_row(name, row, tmp_path)
    assert found.prompt == prompt
    if isinstance(TASKS[name], PromptTask):
        assert TASKS[name].words == options and (found.label,) == right
    elif isinstance(TASKS[name], GenerationTask):
        assert (found.answer,) == options and found.golds == right
    else:
        assert found.options == options and found.right == right


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name, number", CASES)
def test_tokens_are_those_of_prompt_and_option_together(name, number, kind, tmp_path):
    row, prompt, options, right = BY_HAND[name][number]
    tokenizer = TOKENIZERS[kind]
    context, candidates, found = encoded(name, one_row(name, row, tmp_path), tokenizer)
    assert found == right
    for option, ids in zip(options, candidates, strict=True):
        whole = tokenizer(prompt + option).input_ids
        assert [*context, *ids] == (whole[:-1] if kind == "roberta" else whole)
    assert context[0] == tokenizer.bos_token_id and tokenizer.decode(context[1:]) == prompt.rstrip(" ")
    if number == 0:
        marks = {"\u0120": "_", "\u2581": "_", "\u010a": "\n"}
        pieces = [
            ["".join(marks.get(c, c) for c in piece) for piece in tokenizer.convert_ids_to_tokens(ids)] for ids in candidates
        ]
        assert pieces == PIECES[name]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_long_prompt_loses_its_beginning(name, kind, tmp_path):
    row = one_row(name, BY_HAND[name][0].row, tmp_path)
    tokenizer = TOKENIZERS[kind]
    context, candidates, _ = encoded(name, row, tokenizer)
    behind = 50 if name in ("squad", "drop") else max(map(len, candidates)) - 1
    limit = len(context) + behind - 1
    cut, same, _ = encoded(name, row, tokenizer, max_length=limit)
    assert same == candidates and cut == (context[0], *context[2:])
    assert encoded(name, row, tokenizer, max_length=limit + 1)[0] == context


@pytest.mark.parametrize("name", ["boolq", "copa", "record", "squad", "drop"])
def test_the_hubs_reader_gives_the_same_rows(name, tmp_path, monkeypatch):
    """`load_dataset` takes a folder for a hub name, so nested columns and lists go through it without a network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write_task(tmp_path / "hub", name, num_train=5, num_test=3)
    task = replace(TASKS[name], hub_path=str(data), hub_name=None)
    assert task.rows("validation", None) == TASKS[name].rows("validation", str(data))


def test_labels_of_hidden_test_sets_are_no_labels(tmp_path):
    for name, message in (
        ("rte", "has the label -1; task 'rte' knows 0, 1"),
        ("copa", "has the label -1; the 2 options are 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            one_row(name, BY_HAND[name][0].row | {"label": -1}, tmp_path)
    with pytest.raises(InputError, match="validation.jsonl:1: column 'answers.text' is an empty list"):
        one_row("squad", BY_HAND["squad"][0].row | {"answers": {"text": [], "answer_start": []}}, tmp_path)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("copa", {"question": "why"}, "column 'question' is 'why'; its map knows 'effect', 'cause'"),
        ("copa", {"choice1": " "}, "column 'choice1' is empty"),
        ("copa", {"choice1": None}, "column 'choice1' must hold text, got None"),
        ("record", {"query": "nobody"}, "column 'query' has no '@placeholder': 'nobody'"),
        ("record", {"answers": ["Eve"]}, "column 'answers' begins with 'Eve', which is not among the options of 'entities'"),
        ("record", {"entities": ["Ann"]}, "column 'entities' has one option, 'Ann'; a choice needs two"),
        ("record", {"entities": ["Ann", ""]}, "column 'entities' has an empty text"),
        ("record", {"entities": None}, "column 'entities' must hold text or a list of texts, got None"),
        ("squad", {"answers": None}, "column 'answers.text' is missing; the row has 'id', 'title'"),
        ("squad", {"answers": {"text": [""]}}, "column 'answers.text' has an empty text"),
        ("drop", {"passage": None}, "column 'passage' must hold text, got None"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(name, change, message, tmp_path):
    with pytest.raises(InputError, match="validation.jsonl:1: " + message):
        one_row(name, BY_HAND[name][0].row | change, tmp_path)
