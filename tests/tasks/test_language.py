"""Language modelling: which tokens of texts and conversations count, and the loss against a plain computation."""

import math
from dataclasses import replace

import pytest
import torch

from ds_zoadamu.tasks import TASKS, InputError
from tests.helpers.models import tiny_opt
from tests.helpers.tiny_lm import make_model, make_tokenizer, write_jsonl
from tests.helpers.tokenizers_of_tests import llama_like, opt_like

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hello you"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long", "name": "ignored"},
]
TEXTS = ["be kind hi there hello you bye so long", "<|system|>\n<|user|>\n<|assistant|>\n"]


def counted(tokenizer, example):
    """The text of the tokens that count."""
    return tokenizer.decode([token for token, counts in zip(example.ids, example.counted, strict=True) if counts])


@pytest.mark.parametrize("make", [opt_like, llama_like])
def test_the_assistants_turns_count(make):
    tokenizer, task = make(TEXTS), TASKS["chat"]
    row = task.row("here", {"messages": TURNS})
    example = task.bind(tokenizer, None).encode(row)
    expected = (
        "<|system|>\nbe kind</s>\n<|user|>\nhi there</s>\n<|assistant|>\nhello you</s>\n<|user|>\nbye</s>\n"
        "<|assistant|>\nso long</s>\n"
    )
    assert list(example.ids) == tokenizer(expected, add_special_tokens=False).input_ids
    assert counted(tokenizer, example) == "hello you</s>\nso long</s>\n"
    # Without the last answers their words do not count.
    shorter = task.bind(tokenizer, None).encode(task.row("here", {"messages": TURNS[:3]}))
    assert counted(tokenizer, shorter) == "hello you</s>\n"


def test_a_conversation_that_begins_with_the_assistant():
    tokenizer, task = opt_like(TEXTS), TASKS["chat"]
    example = task.bind(tokenizer, None).encode(task.row("here", {"messages": TURNS[2:4]}))
    assert counted(tokenizer, example).endswith("hello you</s>\n") and "bye" not in counted(tokenizer, example)
    assert example.counted[0] == 0


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "column 'messages' must hold a list"),
        ("hi", "column 'messages' must hold a list"),
        (TURNS[:2], "no message of the role 'assistant'"),
        ([{"role": "assistant"}], "message 0 must be"),
        ([{"role": "assistant", "content": None}], "message 0: its content must be text that is not empty, got None"),
        ([{"role": "assistant", "content": " "}], "message 0: its content must be text"),
        ([{"role": "assistant", "content": "\ud800"}], "message 0: its content holds .* a lone surrogate"),
    ],
)
def test_messages_that_are_none(messages, message):
    with pytest.raises(InputError, match=f"here: .*{message}"):
        TASKS["chat"].row("here", {"messages": messages})


def test_templates_that_cannot_be_used_are_refused():
    tokenizer, task = opt_like(TEXTS), TASKS["chat"]
    with pytest.raises(InputError, match="'chat': this model's tokenizer has no chat template"):
        task.bind(make_tokenizer(), None)
    row = task.row("here", {"messages": TURNS})
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(InputError, match="the chat template refuses the conversation .*only one turn"):
        task.bind(tokenizer, None).encode(row)
    # One that writes the last answer in another way than earlier ones.
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}!{% endif %}{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(InputError, match="message 2 of the conversation .*in another way than that of the whole"):
        task.bind(tokenizer, None).encode(row)
    one = task.bind(tokenizer, None).encode(task.row("here", {"messages": TURNS[:3]}))
    assert counted(tokenizer, one) == "!hello you\n"


def test_a_template_that_marks_the_assistants_words_is_believed():
    tokenizer, task = opt_like(TEXTS), TASKS["chat"]
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}!{% endif %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
        "{% endfor %}"
    )
    example = task.bind(tokenizer, None).encode(task.row("here", {"messages": TURNS}))
    assert counted(tokenizer, example) == "hello youso long"


def test_all_tokens_of_a_text_count_but_the_first(tmp_path):
    tokenizer, task = make_tokenizer(), TASKS["text"]
    (tmp_path / "train.txt").write_text("film is great\n\n film is dull \n", encoding="utf-8")
    rows = task.rows("train", str(tmp_path))
    assert [row.prompt for row in rows] == ["film is great", "film is dull"]
    example = task.bind(tokenizer, None).encode(rows[0])
    assert list(example.ids) == tokenizer("film is great").input_ids
    assert example.counted == (0,) + (1,) * (len(example.ids) - 1) and example.cut == 0
    write_jsonl(tmp_path / "validation.jsonl", [{"title": "A", "body": "B"}])
    (row,) = replace(task, template="{title}\n{body}</s>").rows("validation", str(tmp_path))
    assert row.prompt == "A\nB</s>"
    assert task.bind(tokenizer, None).encode(row).ids[-1] == tokenizer.eos_token_id


def test_a_long_text_loses_its_beginning_and_it_is_said():
    tokenizer, task = make_tokenizer(), TASKS["text"]
    bound = task.bind(tokenizer, None, max_length=5)
    row = task.row("here", {"text": "film is great and great and dull"})
    whole, example = tokenizer(row.prompt).input_ids, bound.encode(row)
    assert list(example.ids) == [whole[0], *whole[-4:]] and example.cut == len(whole) - 5
    (line,) = bound.remarks("training", [example, bound.encode(task.row("here", {"text": "film is"}))])
    assert line.startswith("1 of 2 training texts have more than 5 tokens and lose their beginning")
    with pytest.raises(InputError, match="max_length 2 is too short for task 'text'"):
        task.bind(tokenizer, None, max_length=2)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(InputError, match="the text 'a <new>' has the token '<new>' with the id 308"):
        task.bind(tokenizer, tiny_opt().config).encode(task.row("here", {"text": "a <new>"}))


def test_loss_and_weight_equal_the_plain_computation():
    tokenizer, model, task = make_tokenizer(), make_model(), TASKS["text"]
    bound = task.bind(tokenizer, model.config)
    examples = [
        bound.encode(task.row("here", {"text": text})) for text in ("film is great", "film", "a dull and awful film is")
    ]
    total = count = 0.0
    with torch.no_grad():
        loss, weight = bound.loss(model, bound.collate(examples))
        for example in examples:
            ids = torch.tensor([example.ids])
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
            count += ids.numel() - 1
    assert weight == count and loss.item() == pytest.approx(total / count, rel=1e-5)


def test_perplexity_is_lower_the_better():
    metric = TASKS["text"].bind(make_tokenizer(), None).main_metric
    assert (metric.name, metric.higher_is_better) == ("perplexity", False)
    assert metric.improves(3.0, math.inf)
    assert replace(TASKS["chat"], metric="loss").bind(opt_like(TEXTS), None).main_metric.name == "loss"
