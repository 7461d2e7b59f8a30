"""A task's scores do not depend on padding side, batch size, number of ranks or order of rows."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from ds_zoadamu.hf.kinds import MASKED, model_kind
from ds_zoadamu.tasks import TASKS, ChatTask
from tests.helpers.harness import run_ranks
from tests.helpers.hub_rows import rows_of, texts
from tests.helpers.tiny_kinds import make_kind, masked_rows
from tests.helpers.tiny_lm import make_model
from tests.helpers.tokenizers_of_tests import opt_like

pytestmark = pytest.mark.ranks

NAMES = ("sst2", "cb", "multirc", "copa", "record", "squad", "text", "chat")
MASKED_NAMES = ("sst2", "trec", "snli", "rte")
CASES = {"opt": NAMES, "t5": ("sst2", "cb", "copa", "record", "squad"), "roberta": MASKED_NAMES, "bert": MASKED_NAMES[:2]}
COUNT = 11
WAYS = {
    "as it is": {},
    "left": {"side": "left"},
    "one by one": {"batch_size": 1},
    "three": {"batch_size": 3},
    "backwards": {"step": -1},
}


def _examples(name, task, seed=5):
    source = "sst2" if name in ("text", "chat") else name
    for row in rows_of(source, COUNT, seed):
        if name == "text":
            row = {"text": row["sentence"]}
        elif name == "chat":
            row = {"messages": [{"role": "user", "content": "is it"}, {"role": "assistant", "content": row["sentence"]}]}
        yield task.row("here", row)


def _model(family):
    if family != "opt":
        return make_kind(family)
    tokenizer = opt_like(texts())
    return make_model(vocab_size=len(tokenizer) + 1, max_position_embeddings=256), tokenizer


def _evaluations(rank, world_size, ways):
    found = {}
    for family, names in CASES.items():
        model, tokenizer = _model(family)
        model.double()  # so that a rounding decides no comparison
        for name, way in itertools.product(names, ways):
            options, data = WAYS[way], TASKS[name]
            if (family, name) == ("t5", "squad"):
                data = replace(data, max_new_tokens=5)
            tokenizer.padding_side = tokenizer.truncation_side = options.get("side", "right")
            if model_kind(model.config) is MASKED:
                data = data.for_models(MASKED)
                rows = [data.row("here", row) for row in masked_rows(name, COUNT, seed=5)]
            else:
                rows = list(_examples(name, data))
            task = data.bind(tokenizer, model.config, batch_size=options.get("batch_size", 4))
            rows = rows[:: options.get("step", 1)]
            name = name if family == "opt" else f"{family} {name}"
            found[name, way] = dict(task.evaluate(model, list(map(task.encode, rows))))
    return found


@pytest.fixture(scope="module")
def results():
    (one,) = run_ranks(1, _evaluations, list(WAYS))
    return one, run_ranks(2, _evaluations, ["as it is", "three"])


def test_scores_are_the_same_in_every_way(results):
    one, two = results
    for name in dict.fromkeys(name for name, _ in one):
        plain = one[name, "as it is"]
        for way in WAYS:
            now = one[name, way]
            exact = [kind for kind in now if kind not in ("loss", "perplexity")]
            assert {kind: now[kind] for kind in exact} == {kind: plain[kind] for kind in exact}, (name, way)
            # A batch of other shape is rounded in another way, in the last of fp64's 16 digits; scores are compared in fp32.
            assert now["loss"] == pytest.approx(plain["loss"], rel=1e-6), (name, way)
        assert one[name, "left"] == plain  # the same bits
        for of_rank in two:
            assert of_rank[name, "as it is"] == plain and of_rank[name, "three"] == one[name, "three"]


def test_scores_are_what_they_should_be(results):
    one, _ = results
    assert list(one["sst2", "three"]) == ["accuracy", "loss", "num_examples", "num_nonfinite"]
    assert list(one["cb", "three"]) == ["accuracy", "macro_f1", "loss", "num_examples", "num_nonfinite"]
    assert list(one["squad", "three"]) == ["f1", "exact_match", "loss", "num_examples", "num_nonfinite"]
    assert list(one["chat", "three"]) == ["perplexity", "loss", "num_examples", "num_nonfinite"]
    assert all(result["num_examples"] == COUNT and result["num_nonfinite"] == 0 for result in one.values())
    for name in ("copa", "record"):
        assert one[name, "three"]["accuracy"] == _plain_accuracy(name)
    assert one["text", "three"]["perplexity"] == pytest.approx(math.exp(one["text", "three"]["loss"]))


def _plain_accuracy(name):
    """By the mean log-probability of each option's tokens, one option at a time."""
    tokenizer, hits = opt_like(texts()), 0
    model = make_model(vocab_size=len(tokenizer) + 1, max_position_embeddings=256).double()
    for row in _examples(name, TASKS[name]):
        means = []
        for option in row.options:
            ids = tokenizer(row.prompt + option).input_ids
            start = len(tokenizer(row.prompt.rstrip()).input_ids)
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            means.append(sum(log_probs[at - 1, ids[at]].item() for at in range(start, len(ids))) / (len(ids) - start))
        hits += means.index(max(means)) in row.right
    return hits / COUNT


def test_nothing_here_is_forgotten():
    kinds = {type(task) for task in TASKS.values()} - {type(TASKS.get("lengths"))}
    assert {type(TASKS[name]) for name in NAMES} == kinds and ChatTask in kinds
