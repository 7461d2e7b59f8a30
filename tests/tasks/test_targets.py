"""Tasks of sequence-to-sequence models: the tokens of encoder and decoder, by hand, and scores and texts by plain forwards."""

from dataclasses import replace

import pytest
import torch

from ds_zoadamu.tasks import TASKS, GenerationTask, InputError, PromptTask
from ds_zoadamu.tasks.greedy import generate
from ds_zoadamu.tasks.scoring import token_log_probs
from tests.helpers.hub_rows import BY_HAND, rows_of
from tests.helpers.tiny_kinds import make_kind
from tests.tasks.test_greedy import Letters

MODELS = {family: make_kind(family) for family in ("t5", "bart")}
PIECES = {  # of the options as T5 writes them, with _ for a space before a word, and their end
    "sst2": ["_terrible /", "_great /"],
    "rte": ["_Yes /", "_No /"],
    "cb": ["_Yes /", "_No /", "_Maybe /"],
    "boolq": ["_Yes /", "_No /"],
    "wsc": ["_No /", "_Yes /"],
    "wic": ["_No /", "_Yes /"],
    "multirc": ["_No /", "_Yes /"],
    "copa": ["_he _got _a _hole . /", "_he _dropped _a _hammer . /"],
    "record": [f"_The _race _was _won _by _{who} , _who _is _fast . /" for who in ("Bob", "Ann", "Rome")],
    "squad": ["_Rome /"],
    "drop": ["_4 /"],
}


def encoded(name, family, number=0, **limits):
    """The row, and (context, candidates) of it."""
    model, tokenizer = MODELS[family]
    row = TASKS[name].row("here", BY_HAND[name][number].row)
    example = TASKS[name].bind(tokenizer, model.config, **limits).encode(row)
    return row, example.context, (example.answer,) if isinstance(TASKS[name], GenerationTask) else example.candidates


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", BY_HAND)
def test_prompt_and_options_are_texts_of_their_own(name, family):
    tokenizer = MODELS[family][1]
    for number, asked in enumerate(BY_HAND[name]):
        row, context, candidates = encoded(name, family, number)
        assert row.prompt == asked.prompt and list(context) == tokenizer(asked.prompt).input_ids
        targets = [tokenizer(option.strip()).input_ids[1 if family == "bart" else 0 :] for option in asked.options]
        assert list(map(list, candidates)) == targets
        if number == 0 and family == "t5":
            pieces = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in candidates]
            assert [text.replace("\u2581", "_").replace("</s>", "/") for text in pieces] == PIECES[name]
            assert "".join(tokenizer.decode(context).split()) == "".join(f"{asked.prompt}</s>".split())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", ["sst2", "copa", "squad"])
def test_a_long_prompt_loses_its_beginning(name, family):
    _, context, candidates = encoded(name, family)
    first = 1 if family == "bart" else 0
    limit = max(len(context) - 1, 52 + first if name == "squad" else 0)
    _, cut, same = encoded(name, family, max_length=limit)
    excess = len(context) - min(limit, len(context))
    assert same == candidates and cut == (*context[:first], *context[first + excess :])


class Deaf:
    """A tokenizer to which some characters are nothing."""

    pad_token_id, model_max_length = 0, 99

    def __call__(self, text, **more):
        return MODELS["t5"][1](text.replace("\u200b", ""), **more)


def test_what_cannot_be_asked_is_named():
    model, tokenizer = MODELS["t5"]
    with pytest.raises(InputError, match="the answers of the prompt .* take 51 tokens, and the model sees at most 20 at once"):
        encoded("squad", "t5", max_length=20)
    with pytest.raises(InputError, match="the option .* has no tokens"):
        task = replace(TASKS["copa"], options=["{choice1}", " \u200b"])
        task.bind(Deaf(), model.config).encode(task.row("here", BY_HAND["copa"][0].row))
    for name in ("text", "chat"):
        with pytest.raises(
            InputError, match=f"task '{name}' of kind '{name}' is for causal models; this one is a sequence-to-se"
        ):
            TASKS[name].bind(tokenizer, model.config)
    config = type(model.config)(**{**model.config.to_dict(), "decoder_start_token_id": None})
    with pytest.raises(InputError, match="has no decoder_start_token_id"):
        TASKS["sst2"].bind(tokenizer, config)


def plain_log_probs(family, context, ids):
    """Of each token of a text, by the model's own loss without padding, a token at a time."""
    model, tokenizer = MODELS[family]
    start = [model.config.decoder_start_token_id, *([tokenizer.bos_token_id] if family == "bart" else [])]
    with torch.no_grad():
        given = {"input_ids": torch.tensor([context]), "decoder_input_ids": torch.tensor([[*start, *ids[:-1]]])}
        log_probs = model(**given).logits[0, len(start) - 1 :].double().log_softmax(-1)
    return [log_probs[index, token].item() for index, token in enumerate(ids)]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", ["sst2", "copa", "record", "squad"])
def test_options_are_scored_by_the_decoder(name, family):
    model, tokenizer = MODELS[family]
    task = TASKS[name].bind(tokenizer, model.config)
    examples = [task.encode(TASKS[name].row("here", row)) for row in rows_of(name, 3, seed=4)]
    batch = task.right_answers(examples) if name == "squad" else None
    if name != "squad":
        every = TASKS[name] if isinstance(TASKS[name], PromptTask) else replace(TASKS[name], objective="cross_entropy")
        task = every.bind(tokenizer, model.config)
        batch = task.collate(examples)
    with torch.no_grad():
        found = token_log_probs(model, batch)
    for example, of_example in zip(examples, found.tolist(), strict=True):
        candidates = (example.answer,) if name == "squad" else example.candidates
        for ids, of_option in zip(candidates, of_example, strict=False):
            # A forward of other shape, in fp32.
            assert of_option[: len(ids)] == pytest.approx(plain_log_probs(family, example.context, ids), rel=1e-4)
            assert not any(of_option[len(ids) :])


@pytest.mark.parametrize("family", MODELS)
def test_greedy_texts_are_those_of_one_forward_a_token(family):
    model, tokenizer = MODELS[family]
    start = (model.config.decoder_start_token_id, *([tokenizer.bos_token_id] if family == "bart" else []))
    contexts, expected = [[5, 9, 1], [40, 41, 42, 43, 44, 45, 46, 1], [7, 1]], []
    for context in contexts:
        ids = list(start)
        for _ in range(5):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context]), decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        expected.append(" ".join(map(str, ids[len(start) :])))
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    assert generate(model, Letters(), contexts, 5, 0, start) == expected
    assert [generate(model, Letters(), [context], 5, 0, start)[0] for context in contexts] == expected
    second = int(expected[1].split()[1])
    until = [
        text.split()[: text.split().index(str(second))] if str(second) in text.split() else text.split() for text in expected
    ]
    assert [text.split() for text in generate(model, Letters(eos=second), contexts, 5, 0, start)] == until
    model.generation_config.eos_token_id = own
