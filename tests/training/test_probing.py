"""Demonstrations and linear probing, on one and two ranks; a probe against scikit-learn and NumPy on a plain model."""

import contextlib
import io
import json
from pathlib import Path

import numpy
import pytest
import torch
import transformers

from ds_zoadamu.hf.kinds import MASKED
from ds_zoadamu.tasks import TASKS, InputError
from ds_zoadamu.tasks.splits import load_splits
from tests.helpers.harness import run_ranks
from tests.helpers.hub_rows import save_task_model, write_task
from tests.helpers.tiny_kinds import save_kind, write_masked
from tests.helpers.tiny_lm import write_data

linear_model = pytest.importorskip("sklearn.linear_model")

ROOT = Path(__file__).parents[2]
ASKED = {
    "zero-shot": ("sst2",),
    "demonstrations": ("sst2", "--demonstrations", "3"),
    "another seed": ("sst2", "--demonstrations", "3", "--seed", "1"),
    "probing": ("sst2", "--linear_probing", "--num_train", "24"),
    "probing cb": ("cb", "--linear_probing", "--num_train", "12"),
    "probing copa": ("copa", "--linear_probing", "--num_train", "8"),
    "probing answers": ("squad", "--linear_probing", "--num_train", "8"),
    "demonstrations of answers": ("squad", "--demonstrations", "2"),
    "probing a masked model": ("trec", "--linear_probing", "--num_train", "36"),
}


def arguments(folder, name):
    task, *more = ASKED[name]
    known = str(folder / "squad.json") if task == "squad" else task
    model = folder / ("masked" if task == "trec" else "model")
    return ["--model_name_or_path", str(model), "--task", known, "--data_dir", str(folder / task), *more]


def _measured(rank, world_size, folder):
    from ds_zoadamu.training.arguments import evaluate_parser
    from ds_zoadamu.training.measure import measure

    found = {}
    for name in ASKED:
        with contextlib.redirect_stdout(io.StringIO()):
            found[name] = measure(evaluate_parser().parse_args(arguments(folder, name)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probing")
    save_task_model(folder / "model")
    save_kind(folder / "masked", "roberta")
    write_masked(folder / "trec", "trec")
    write_data(folder / "sst2", num_train=60, num_test=21)
    for task in ("cb", "copa", "squad"):
        write_task(folder / task, task, num_train=30, num_test=9)
    squad = json.loads((ROOT / "ds_zoadamu" / "tasks" / "data" / "squad.json").read_text())
    (folder / "squad.json").write_text(json.dumps(squad | {"max_new_tokens": 4}))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return {ranks: run_ranks(ranks, _measured, folder) for ranks in (1, 2)}


@pytest.mark.ranks
def test_the_same_on_one_and_two_ranks(found):
    (one,), (two, other) = found[1], found[2]
    assert one == two == other
    assert len({one[name]["loss"] for name in list(ASKED)[:4]}) == 4
    assert (one["zero-shot"]["tuning"], one["probing"]["tuning"]) == ("zero_shot", "linear_probing")
    assert (one["demonstrations"]["tuning"], one["demonstrations"]["demonstrations"]) == ("in_context", 3)
    assert {"f1", "exact_match"} <= one["probing answers"].keys() & one["demonstrations of answers"].keys()


def _states(model, sequences):
    """The last states and logits behind each sequence, of a plain model without padding."""
    states, logits = [], []
    with torch.no_grad():
        for ids in sequences:
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            states.append(output.hidden_states[-1][0, -1].double())
            logits.append(output.logits[0, -1].double())
    return torch.stack(states).numpy(), torch.stack(logits).numpy()


@pytest.mark.ranks
def test_a_probe_is_scikit_learns_on_the_states_of_a_plain_model(folder, found):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    task = TASKS["sst2"].bind(transformers.AutoTokenizer.from_pretrained(folder / "model"), model.config)
    rows = load_splits(TASKS["sst2"], str(folder / "sst2"), num_train=24, seed=0)
    train, test = (list(map(task.encode, rows[name])) for name in ("train", "test"))
    words = [ids[0] for ids in train[0].candidates]
    features, logits = _states(model, [example.context for example in train])
    head = model.lm_head.weight.double().detach().numpy()  # its input is what is meant
    numpy.testing.assert_allclose(features @ head.T, logits, rtol=1e-4, atol=1e-4)
    regression = linear_model.LogisticRegressionCV(
        cv=5, fit_intercept=False, max_iter=5000, random_state=0, scoring="accuracy"
    ).fit(features, [words[example.label] for example in train])
    states, logits = _states(model, [example.context for example in test])
    margins = states @ regression.coef_[0]
    signs = dict(zip(regression.classes_.tolist(), (-0.5, 0.5), strict=True))  # coefficients are the difference of two rows
    for word, sign in signs.items():
        logits[:, word] = sign * margins
    log_probs = logits - numpy.log(numpy.exp(logits).sum(axis=1, keepdims=True))
    scores = log_probs[:, words]
    labels = numpy.array([example.label for example in test])
    measured = found[1][0]["probing"]
    assert measured["accuracy"] == (scores.argmax(axis=1) == labels).mean()
    of_words = scores - numpy.log(numpy.exp(scores).sum(axis=1, keepdims=True))
    # The states are fp32 sums in batches there and one by one here, and the regression stops at a tolerance.
    assert measured["loss"] == pytest.approx(-of_words[numpy.arange(len(labels)), labels].mean(), rel=1e-3)
    assert measured["linear_probing"] == {"num_train": 24, "num_tokens": 2, "C": float(numpy.ravel(regression.C_)[0])}


@pytest.mark.ranks
def test_a_probe_of_a_masked_model_is_fitted_to_the_states_at_the_mask(folder, found):
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder / "masked").eval()
    task = (
        TASKS["trec"]
        .for_models(MASKED)
        .bind(transformers.AutoTokenizer.from_pretrained(folder / "masked"), model.config, max_length=None, batch_size=16)
    )
    rows = load_splits(TASKS["trec"].for_models(MASKED), str(folder / "trec"), num_train=36, seed=0)
    train, test = (list(map(task.encode, rows[name])) for name in ("train", "test"))

    def states(examples):
        with torch.no_grad():
            return torch.stack([_before_words(model, e.ids)[e.position] for e in examples]).double().numpy()

    regression = linear_model.LogisticRegressionCV(
        cv=5, fit_intercept=False, max_iter=5000, random_state=0, scoring="accuracy"
    ).fit(states(train), [e.words[e.label] for e in train])
    scores = states(test) @ regression.coef_.T
    order = [regression.classes_.tolist().index(word) for word in test[0].words]
    right = [e.label for e in test]
    measured = found[1][0]["probing a masked model"]
    assert measured["accuracy"] == numpy.mean(scores[:, order].argmax(axis=1) == right)
    assert measured["linear_probing"]["num_tokens"] == 6


def _before_words(model, ids) -> torch.Tensor:
    """The states before RoBERTa's matrix of words, of one sequence."""
    head, hidden = model.lm_head, model.roberta(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return head.layer_norm(torch.nn.functional.gelu(head.dense(hidden)))


@pytest.mark.parametrize(
    "more,message",
    [
        (("--linear_probing", "--demonstrations", "2"), "--linear_probing does not go with --demonstrations"),
        (("--linear_probing", "--split", "train"), "--linear_probing does not go with --split train"),
        (("--objective", "accuracy"), "--objective accuracy: nothing is trained here; leave it out"),
        (("--num_train", "2"), "--num_train is an option of --linear_probing"),
        (("--demonstrations", "0"), "--demonstrations must be at least 1, got 0"),
        (("--demonstrations", "100"), "has 60 rows that are not asked"),
    ],
)
def test_refused(folder, more, message):
    from ds_zoadamu.training.arguments import evaluate_parser
    from ds_zoadamu.training.measure import measure

    with pytest.raises(InputError, match=message):
        measure(evaluate_parser().parse_args([*arguments(folder, "zero-shot"), *more]))
