"""Tasks of masked models: rows and tokens written out by hand, what is cut, what is refused, and losses by plain forwards."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers

from ds_zoadamu.hf.kinds import CAUSAL, MASKED
from ds_zoadamu.tasks import SST2, TASKS, InputError, PromptTask
from ds_zoadamu.tasks.masked import mask_logits
from ds_zoadamu.tasks.registry import read_task
from tests.helpers.hub_rows import texts
from tests.helpers.tiny_kinds import MASKED_BY_HAND, make_kind, masked_rows, masked_texts
from tests.helpers.tokenizers_of_tests import opt_like

FAMILIES = ("roberta", "bert")
MODELS = {name: make_kind(name) for name in (*FAMILIES, "deberta")}
PIECES = {  # with _ for a space before a word, and * for the mask
    "sst2": (["a", "_joy", "_to", "_watch", "_It", "_was", "*", "."], ["a", "joy", "to", "watch", "it", "was", "*", "."]),
    "sst5": (["so", "_dull", "_It", "_was", "*", "."], ["so", "dull", "it", "was", "*", "."]),
    "trec": (["*", ":", "_Who", "_is", "_Ann", "_?"], ["*", ":", "who", "is", "ann", "?"]),
    "snli": (["A", "_man", "_eats", "?", "*", ",", "_a", "_man", "_runs", "."],
             ["a", "man", "eats", "?", "*", ",", "a", "man", "runs", "."]),
    "mnli": (["We", "_sat", "?", "*", ",", "_we", "_ran"], ["we", "sat", "?", "*", ",", "we", "ran"]),
    "rte": (["Dogs", "_bark", "?", "*", ",", "_dogs", "_are", "_quiet", "."],
            ["dogs", "bark", "?", "*", ",", "dogs", "are", "quiet", "."]),
}  # fmt: skip


def of_masked(name):
    return TASKS[name].for_models(MASKED)


def bound(name, family, **changes):
    model, tokenizer = MODELS[family]
    limits = {"max_length": changes.pop("max_length", None)}
    return replace(of_masked(name), **changes).bind(tokenizer, model.config, **limits)


def examples(name, family, count=7, **changes):
    task = bound(name, family, **changes)
    return task, [task.encode(of_masked(name).row("here", row)) for row in masked_rows(name, count, seed=3)]


@pytest.mark.parametrize("number, family", list(enumerate(FAMILIES)))
@pytest.mark.parametrize("name", MASKED_BY_HAND)
def test_a_row_is_asked_as_the_paper_does(name, number, family):
    asked, (_, tokenizer) = MASKED_BY_HAND[name], MODELS[family]
    row = of_masked(name).row("here", asked.row)
    assert (row.prompt, row.label) == (asked.text.replace("_", "{mask}"), asked.right)
    assert of_masked(name).words == asked.words
    example = bound(name, family).encode(row)
    marks = {"\u0120": "_"}
    pieces = ["".join(marks.get(c, c) for c in piece) for piece in tokenizer.convert_ids_to_tokens(example.ids)]
    pieces = ["*" if piece == tokenizer.mask_token else piece for piece in pieces]
    around = (["<s>"], ["</s>"]) if family == "roberta" else (["[CLS]"], ["[SEP]"])
    assert pieces == [*around[0], *PIECES[name][number], *around[1]]
    assert example.ids[example.position] == tokenizer.mask_token_id and example.label == asked.right
    words = [piece.replace("\u0120", " ") for piece in tokenizer.convert_ids_to_tokens(example.words)]
    assert words == (list(asked.words) if family == "roberta" else [word.strip().lower() for word in asked.words])


def test_lengths_and_limits_are_the_papers():
    found = {}
    for name in MASKED_BY_HAND:
        task = of_masked(name)
        found[name] = task.max_length, {key: field["max_tokens"] for key, field in task.fields.items() if "max_tokens" in field}
    assert found == {
        "sst2": (128, {}), "sst5": (128, {"text": 110}), "trec": (128, {"text": 110}), "snli": (256, {}),
        "mnli": (256, {"premise": 240}), "rte": (256, {"premise": 240}),
    }  # fmt: skip
    assert all(of_masked(name).num_test == 1000 for name in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_text_loses_its_end(family):
    """By the task's limits, of a column and of the whole; the mask, and what stands around a text, are kept."""
    model, tokenizer = MODELS[family]
    row = {"premise": "Dogs " + "bark " * 300 + "!", "hypothesis": "dogs are quiet " * 20, "label": 0}
    example = bound("rte", family).encode(of_masked("rte").row("here", row))
    assert len(example.ids) == 256 and example.position == 1 + 240 + 1
    pieces = [piece.strip("\u0120").lower() for piece in tokenizer.convert_ids_to_tokens(example.ids)]
    assert pieces[1:244] == ["dogs", *["bark"] * 239, "?", tokenizer.mask_token.lower(), ","]
    assert pieces[244:255] == [*["dogs", "are", "quiet"] * 3, "dogs", "are"] and example.ids[-1] == tokenizer("a").input_ids[-1]
    shorter = bound("rte", family, max_length=250).encode(of_masked("rte").row("here", row))
    assert shorter.ids == (*example.ids[:249], example.ids[-1])
    longer = bound("trec", family, max_length=200).encode(
        of_masked("trec").row("here", {"text": "Ann " * 250, "coarse_label": 1})
    )
    assert len(longer.ids) == 1 + 2 + 110 + 1  # --max_length is more than the task's 128, the column's limit stays


@pytest.mark.parametrize(
    "change, row, message",
    [
        ({}, {"sentence": "dull " * 200, "label": 0}, r'has its mask behind the 128 tokens .*"max_tokens".*--max_length'),
        ({}, {"sentence": "a <mask> film", "label": 0}, "has 2 masks: a column's text holds the .* mask token '<mask>'"),
        ({"label_words": [" great", " great fun"]}, None, r"the label word ' great fun' is \['.great', .*for one token"),
        ({"label_words": [" great", "Qreat"]}, None, "the label word 'Qreat' is .* a mask stands for one token"),
        ({"template": "{sentence} It was"}, None, r"a masked model, and the template is .*one with \{mask\}, by --template"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_named(change, row, message):
    with pytest.raises(InputError, match=message):
        bound("sst2", "roberta", **change).encode(of_masked("sst2").row("here", row))


def test_words_and_tokenizers_that_cannot_answer_are_named():
    with pytest.raises(InputError, match="' Great' and ' great' are the same tokens"):
        bound("sst2", "bert", label_words=[" Great", " great"])
    with pytest.raises(InputError, match=r"the label word ' .*' is \['\[UNK\]'\]"):
        bound("sst2", "bert", label_words=[" great", " \u597d"])
    model, _ = MODELS["roberta"]
    with pytest.raises(InputError, match="task 'sst2': this model's tokenizer has no mask token"):
        of_masked("sst2").bind(opt_like([*texts(), *masked_texts()]), model.config)
    for name in ("copa", "squad", "text"):
        with pytest.raises(InputError, match=f"task '{name}' of kind .* masked"):
            TASKS[name].bind(MODELS["roberta"][1], model.config)
    with pytest.raises(InputError, match=r"task 'trec': this is a causal model, and the template is .*one without \{mask\}"):
        TASKS["trec"].for_models(CAUSAL).bind(opt_like(texts()), None)


def at_mask(model, example):
    """The logits at the mask, out of those of all positions."""
    ids = torch.tensor([example.ids])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, example.position]


@pytest.mark.parametrize("family", ["roberta", "bert", "deberta"])
def test_the_vocabulary_is_looked_at_where_the_mask_is(family):
    model, _ = MODELS[family]
    task, every = examples("rte", family)
    with torch.no_grad():
        for example in every:
            found = mask_logits(model, task.collate([example]))[0]
            torch.testing.assert_close(found, at_mask(model, example), rtol=1e-5, atol=1e-6)  # a product of 1 row, not of all
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda _, given, made: shapes.append(made.shape[:2]))
    mask_logits(model, task.collate(every))
    assert shapes == [(len(every), 1)]


def test_a_model_whose_vocabulary_is_no_module_gives_the_same():
    config = transformers.DebertaV2Config(
        vocab_size=320, hidden_size=20, intermediate_size=31, num_hidden_layers=1, num_attention_heads=2, legacy=False
    )
    model = transformers.DebertaV2ForMaskedLM(config).eval()
    task, every = examples("sst2", "bert")
    with torch.no_grad():
        for example in every:
            found = mask_logits(model, task.collate([example]))[0]
            torch.testing.assert_close(found, at_mask(model, example), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["cross_entropy", "lm", "accuracy"])
@pytest.mark.parametrize("name", ["sst2", "trec"])
def test_losses_and_metrics_equal_the_plain_computation(name, objective):
    model, _ = MODELS["roberta"]
    task, every = examples(name, "roberta", objective=objective)
    total = hits = 0
    for example in every:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0, example.position].double()
        of_words = logits[list(example.words)].tolist()
        right = of_words.index(max(of_words)) == example.label
        hits += right
        losses = {
            "cross_entropy": math.log(sum(map(math.exp, of_words))) - of_words[example.label],
            "lm": -logits.log_softmax(-1)[example.words[example.label]].item(),
            "accuracy": 1 - right,
        }
        total += losses[objective]
    with torch.no_grad():
        loss, weight = task.loss(model, task.collate(every))
    assert loss.item() == pytest.approx(total / len(every), rel=1e-5)  # fp32 against fp64
    assert int(weight) == len(every) and task.details == {"objective": objective}
    assert task.differentiable == (objective != "accuracy") and 0 < hits < len(every)


def test_a_task_of_ones_own_says_it_all_in_its_file(tmp_path):
    content = {
        "template": "{text} It was",
        "label_words": [" terrible", " great"],
        "masked": {
            "template": "{text} It was{mask}.", "fields": {"text": {"max_tokens": 3}}, "examples_per_class": 4, "max_length": 9
        },
        "ignored_labels": [-1, "?"],
    }  # fmt: skip
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    task = read_task(path)
    assert task.for_models(CAUSAL).examples_per_class is None and not task.for_models(CAUSAL).has_mask
    masked = task.for_models(MASKED)
    assert (masked.name, masked.examples_per_class, masked.max_length, masked.has_mask) == ("mine", 4, 9, True)
    rows = [{"text": text, "label": label} for text, label in (("a", 1), ("b", -1), ("c", "?"), ("so dull so dull", 0))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = masked.rows("train", str(tmp_path))
    assert [(row.prompt, row.label) for row in found] == [("a It was{mask}.", 1), ("so dull so dull It was{mask}.", 0)]
    model, tokenizer = MODELS["roberta"]
    example = masked.bind(tokenizer, model.config).encode(found[1])
    assert tokenizer.decode(example.ids) == "<s>so dull so It was<mask>.</s>"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"masked": {"template": "{sentence} It was"}}, "of the two templates, that of masked models is to have {mask}"),
        ({"masked": {}}, "of the two templates"),
        ({"masked": ["{mask}"]}, 'masked must be {"template": '),
        ({"masked": {"templat": "{mask}"}}, "masked: unknown 'templat'"),
        ({"masked": {"template": "{sentence}{mask}", "score": "best"}}, "masked: .*score is 'best'"),
        ({"template": "{sentence}{mask}"}, "of the two templates"),
        ({"fields": {"sentence": {"max_tokens": 0}}}, "fields.sentence.max_tokens must be a number of at least 1, got 0"),
        ({"masked": None, "template": "It was{mask}"}, "names no column"),
        ({"ignored_labels": "0"}, "ignored_labels must be a list, got '0'"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_task_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(SST2, **change)


def test_a_template_of_the_command_line_is_that_of_the_kind(tmp_path):
    from ds_zoadamu.training.arguments import evaluate_parser, task_from

    words = ["--model_name_or_path", "m", "--template", "{mask}: {sentence}"]
    task = task_from(evaluate_parser().parse_args(words), MASKED)
    assert isinstance(task, PromptTask) and task.has_mask and task.template == "{mask}: {sentence}" and task.name == "custom"
    plain = task_from(evaluate_parser().parse_args(words[:2]), CAUSAL)
    assert plain.template == "{sentence} It was" and plain.masked is None
    # A task for masked models, asked of a causal one; the limit of a column stays.
    words = ["--model_name_or_path", "m", "--task", "sst5", "--template", "{text} It was"]
    tokenizer, sst5 = opt_like([*texts(), *masked_texts()]), task_from(evaluate_parser().parse_args(words), CAUSAL)
    example = sst5.bind(tokenizer, None).encode(sst5.row("here", {"text": "so" + " dull" * 300, "label": 0}))
    assert tokenizer.decode(example.context) == "</s>so" + " dull" * 109 + " It was"
