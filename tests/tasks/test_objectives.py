"""What is trained on, against plain computations; metrics made of counts; what a run's identity says of it."""

import math
from dataclasses import replace

import pytest
import torch

from ds_zoadamu.tasks import SST2, TASKS, PromptTask
from ds_zoadamu.tasks.metrics import f1_of_classes, macro_f1, perplexity
from ds_zoadamu.tasks.objectives import error_rate
from tests.helpers.hub_rows import rows_of, texts
from tests.helpers.tiny_lm import make_model, make_tokenizer, sentences
from tests.helpers.tokenizers_of_tests import opt_like

LONG_WORDS = PromptTask(
    name="long", template="{sentence} It was", label_words={"0": " terrible", "1": " splendid"}, score="mean"
)


def plain_log_probs(model, context, ids):
    """Of each token of an option, by one forward without padding."""
    whole = torch.tensor([[*context, *ids]])
    with torch.no_grad():
        log_probs = model(input_ids=whole).logits.double().log_softmax(-1)
    return [log_probs[0, len(context) + index - 1, token].item() for index, token in enumerate(ids)]


def expected_loss(model, examples, objective):
    """(mean, weight)"""
    total = weight = 0
    for example in examples:
        log_probs = [plain_log_probs(model, example.context, ids) for ids in example.candidates]
        means = [sum(values) / len(values) for values in log_probs]
        if objective == "lm":
            total -= sum(log_probs[example.label])
            weight += len(log_probs[example.label])
            continue
        right = getattr(example, "right", (example.label,))
        exponents = sum(math.exp(mean) for mean in means)
        wrong = means.index(max(means)) not in right
        total += wrong if objective == "accuracy" else math.log(exponents) - means[example.label]
        weight += 1
    return total / weight, weight


@pytest.mark.parametrize("objective", ["cross_entropy", "lm", "accuracy"])
@pytest.mark.parametrize("name", ["long", "copa", "record"])
def test_losses_of_options_equal_the_plain_computation(name, objective):
    if name == "long":
        tokenizer, task, rows = make_tokenizer(), LONG_WORDS, sentences(6, seed=4)
        model = make_model()
    else:
        tokenizer, task, rows = opt_like(texts()), TASKS[name], rows_of(name, 6, seed=4)
        model = make_model(vocab_size=len(tokenizer) + 1, max_position_embeddings=256)
    bound = replace(task, objective=objective).bind(tokenizer, model.config)
    examples = [bound.encode(task.row("here", row)) for row in rows]
    with torch.no_grad():
        loss, weight = bound.loss(model, bound.collate(examples))
    mean, count = expected_loss(model, examples, objective)
    assert loss.item() == pytest.approx(mean, rel=1e-4, abs=1e-6) and weight == count
    assert bound.differentiable == (objective != "accuracy") and bound.details["objective"] == objective
    # One example at a time, averaged by weight, is the same: what a step over several micro-batches and ranks does.
    with torch.no_grad():
        parts = [bound.loss(model, bound.collate([example])) for example in examples]
    assert sum(loss.item() * int(weight) for loss, weight in parts) / count == pytest.approx(mean, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", ["f1", "exact_match"])
def test_losses_of_answers_are_one_minus_the_metric(objective, monkeypatch):
    task = replace(TASKS["squad"], objective=objective).bind(opt_like(texts()), None)
    rows = [TASKS["squad"].row("here", row) for row in rows_of("squad", 3, seed=1)]
    batch = task.collate([task.encode(row) for row in rows])
    assert batch["golds"] == [["Rome", "the city"]] * 3
    monkeypatch.setattr(task, "write", lambda model, contexts: ["rome!", "a city of Rome", ""])
    loss, weight = task.loss(None, batch)
    f1s = [1.0, 2 * 1 / (3 + 1), 0.0]
    assert weight == 3 and loss.item() == pytest.approx(1 - (sum(f1s) if objective == "f1" else 1) / 3)


def test_error_rate():
    right = torch.tensor([[True, False, False], [False, True, True]])
    scores = torch.tensor([[1.0, 0.0, -math.inf], [2.0, 1.0, 1.5]])
    assert error_rate(scores, right) == (torch.tensor(0.5), 2)
    for broken in (math.nan, math.inf):
        scores[0, 1] = broken
        assert error_rate(scores, right)[0].isnan()  # such a step is skipped, as with any other loss


def test_f1_of_counts():
    # Classes 0, 1, 2: 2 of 3 predictions right of 4 examples; none of 1 of 2; the third neither predicted nor there.
    hits, predicted, actual = (2, 0, 0), (3, 1, 0), (4, 2, 0)
    assert f1_of_classes(hits, predicted, actual) == [pytest.approx(4 / 7), 0, 0]
    assert macro_f1(hits, predicted, actual) == pytest.approx(2 / 7)
    assert macro_f1((0,), (0,), (0,)) == 0
    assert perplexity(0.0) == 1 and perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))


def test_what_earlier_releases_did_is_not_named_in_a_journal():
    tokenizer = make_tokenizer()

    def identity(task):
        bound = task.bind(tokenizer, None)
        return bound.identity([bound.encode(task.row("here", row)) for row in sentences(3, seed=1)])

    assert identity(SST2) == {} == identity(replace(SST2, score="sum")) == identity(replace(LONG_WORDS, score="sum"))
    assert identity(LONG_WORDS) == {"score": "mean"}
    assert identity(replace(SST2, objective="lm")) == {"objective": "lm"}
