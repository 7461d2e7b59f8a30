"""Task files: what a file may say, in JSON and YAML, and what is refused by name."""

import json

import pytest

from ds_zoadamu.tasks import TASKS, ChoiceTask, InputError, PromptTask, load_task
from ds_zoadamu.tasks.registry import KINDS, read_task
from tests.helpers.tiny_lm import make_tokenizer, write_jsonl

CHOICE = {"kind": "multiple_choice", "template": "{q}", "options": [" {a}", " {b}"]}
LISTED = {"kind": "multiple_choice", "template": "{q}", "options": [" {option}"], "options_column": "all"}
ANSWER = {"kind": "generation", "template": "{q} A:", "answers_column": "right"}
WORDS = {"template": "{a} It was", "label_words": [" x", " y"]}


def task_of(folder, content, suffix=".json"):
    path = folder / f"mine{suffix}"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_task(str(path))


def row_of(task, row):
    return task.row("here", row)


def test_the_packages_tasks_are_files_that_anybody_could_write(tmp_path):
    from ds_zoadamu.tasks import registry

    for name, task in TASKS.items():
        if name == "lengths":
            continue
        text = (registry._DATA / f"{name}.json").read_text()
        (tmp_path / f"{name}.json").write_text(text)
        assert read_task(tmp_path / f"{name}.json") == task and type(task) is KINDS[json.loads(text)["kind"]]


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_yaml_says_the_same(tmp_path, suffix):
    text = """
kind: classification
template: |-
  {title}: {body}
  Topic:
label_words: {0: " sports", "politics": " politics"}
fields:
  title: {column: Title of it, transforms: [lower, {strip_end: .}]}
"""
    task = task_of(tmp_path, text, suffix)
    assert task == PromptTask(
        name="mine",
        template="{title}: {body}\nTopic:",
        label_words={"0": " sports", "politics": " politics"},
        fields={"title": {"column": "Title of it", "transforms": ["lower", {"strip_end": "."}]}},
    )
    row = row_of(task, {"Title of it": "The Cup.", "body": "Won", "label": "politics"})
    assert (row.prompt, row.label) == ("the cup: Won\nTopic:", 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1", "mine.yaml: not YAML: line "),
        ("a: &x 1\nb: *x", "line 2: an alias"),
        ("template: a\ntemplate: b", "line 2: the key 'template' comes twice"),
        ("label_words: {no: a, yes: b}", "line 1: the key False is no text; quote it"),
        ("template: 2020-01-01", "not JSON serializable; quote it"),
        ("- a", "a task file is one JSON object, got list"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("[" * 3000, "nested too deeply|not YAML"),
        ("template: .nan", "not YAML: the number NaN is not finite"),
        ("a: \x01", "not YAML"),
    ],
)
def test_yaml_that_is_none_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as refused:
        task_of(tmp_path, text, ".yaml")
    assert "\n" not in str(refused.value) and "mine.yaml" in str(refused.value)


@pytest.mark.parametrize(
    "transforms, text, expected",
    [
        (["lower"], "Ab C", "ab c"),
        (["upper_first"], "is it", "Is it"),
        (["lower_first"], "Is It", "is It"),
        ([{"lower_first_word_unless": ["I"]}], "NASA Is", "nasa Is"),
        ([{"lower_first_word_unless": ["I"]}], "I am", "I am"),
        ([{"strip_end": "."}], "a..", "a."),
        ([{"ensure_end": "?"}, {"ensure_end": "?"}], "a", "a?"),
        ([{"replace": ["\n", " "]}, "upper_first"], "a\nb\nc", "A b c"),
        ([{"map": {"x": "1"}}], "x", "1"),
        ([{"before": "@"}], "a@b@c", "a"),
        ([{"after": "@"}], "a@b@c", "b@c"),
    ],
)
def test_transforms(tmp_path, transforms, text, expected):
    task = task_of(tmp_path, {"kind": "text", "template": "<{x}>", "fields": {"x": {"column": "y", "transforms": transforms}}})
    assert row_of(task, {"y": f" {text} "}).prompt == f"<{expected}>"


def test_options_of_a_list_and_their_answers(tmp_path):
    task = task_of(tmp_path, LISTED | {"answers_column": "right", "fields": {"option": {"transforms": ["lower"]}}})
    row = row_of(task, {"q": "Q", "all": ["Red", "Blue", "Red "], "right": "Blue"})
    assert row.options == (" red", " blue") and row.right == (1,)
    task = task_of(tmp_path, LISTED)
    assert row_of(task, {"q": "Q", "all": ["Red", "Blue"], "label": "1"}).right == (1,)
    task = task_of(tmp_path, LISTED | {"options_column": "choices.text"})
    assert row_of(task, {"q": "Q", "choices": {"text": ["Red", "Blue"]}, "label": 0}).options == (" Red", " Blue")


def test_a_literal_brace_is_written_twice(tmp_path):
    task = task_of(tmp_path, WORDS | {"template": "{{{a}}} It was"})
    assert row_of(task, {"a": "f(x) {y}", "label": 0}).prompt == "{f(x) {y}} It was"
    for template in ("{a} { It was", "{a} } It was"):
        with pytest.raises(InputError, match=r"malformed: .*; a brace that is part of the text is written twice: {{ or }}"):
            task_of(tmp_path, WORDS | {"template": template})
    with pytest.raises(InputError, match=r"has {\"x\": 1}, which is no column name|has {\"x\"}, which is no column name"):
        task_of(tmp_path, WORDS | {"template": '{a} {"x": 1}'})


@pytest.mark.parametrize(
    "content, message",
    [
        (WORDS | {"kind": "guess"}, "kind is 'guess'; known: classification, multiple_choice, generation, text, chat"),
        (WORDS | {"kind": ["chat"]}, "kind is"),
        (WORDS | {"score": "max"}, "score is 'max'; a task of kind 'classification' knows mean, sum"),
        (WORDS | {"metric": "bleu"}, "metric is 'bleu'; a task of kind 'classification' knows accuracy, f1, macro_f1"),
        (WORDS | {"metric": []}, "metric is"),
        (WORDS | {"metric": 3}, "metric is 3"),
        (WORDS | {"label_words": ["x", "y", "z"], "metric": "f1"}, "f1 is of two labels, and there are 3; take macro_f1"),
        (WORDS | {"objective": "f1"}, "objective is 'f1'; .* knows cross_entropy, lm, accuracy"),
        (WORDS | {"fields": {"a": "lower"}}, 'fields.a must be {"column": name'),
        (WORDS | {"fields": {"a b": {}}}, "a template can only read a name of letters"),
        (WORDS | {"fields": {"a": {"transforms": ["upper"]}}}, "fields.a: 'upper' is no transform; known: lower, upper_first"),
        (WORDS | {"fields": {"a": {"transforms": [{"replace": ["x"]}]}}}, r"fields.a: replace takes \[old, new\], got \['x'\]"),
        (WORDS | {"fields": {"a": {"transforms": "lower"}}}, "fields.a.transforms must be a list, got 'lower'"),
        (WORDS | {"fields": {"a": {"column": 3}}}, "fields.a.column must be a text, got 3"),
        (WORDS | {"num_dev": 0}, "num_dev must be a number of at least 1, got 0"),
        (WORDS | {"num_test": True}, "num_test must be a number"),
        (CHOICE | {"options": [" {a}"]}, "options needs at least two templates over columns"),
        (CHOICE | {"options": [" x", " y"]}, "options needs at least two templates over columns"),
        (CHOICE | {"options": "{a}"}, "options must be a list of templates"),
        (CHOICE | {"options": [" {a}", " {b"]}, "options has ' {b' is malformed"),
        (CHOICE | {"options": None}, "options must be a list of templates"),
        (CHOICE | {"answers_column": "x"}, "answers_column needs options_column"),
        (LISTED | {"options": ["{a}", "{b}"]}, "with options_column, options is one template with {option} in it"),
        (ANSWER | {"answer": " {a}"}, r"answer is ' {a}'; its one column is {answer}"),
        (ANSWER | {"objective": "accuracy"}, "objective is 'accuracy'; .* knows lm, f1, exact_match"),
        ({"kind": "text", "template": "x"}, "template 'x' names no column"),
        ({"kind": "chat", "template": "{x}"}, "unknown 'template'"),
        ({"kind": "chat", "metric": "accuracy"}, "metric is 'accuracy'; .* knows perplexity, loss"),
        ({"kind": "generation"}, "the key 'template' is missing"),
    ],
)
def test_a_file_that_says_no_task_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=f"mine.json: .*{message}|mine.json: {message}"):
        task_of(tmp_path, content)


def test_options_are_compared_as_tokens(tmp_path):
    task = task_of(tmp_path, CHOICE).bind(make_tokenizer(), None)
    row = row_of(load_task(str(tmp_path / "mine.json")), {"q": "film is", "a": "great", "b": "great", "label": 0})
    with pytest.raises(InputError, match="the options ' great' and ' great' are the same tokens"):
        task.encode(row)
    listed = task_of(tmp_path, LISTED | {"answers_column": "right"})
    with pytest.raises(InputError, match="the options ' great' and ' GREAT' are the same tokens"):
        listed.bind(Lower(), None).encode(row_of(listed, {"q": "film", "all": ["great", "GREAT", "dull"], "right": "great"}))
    example = listed.bind(Lower(), None).encode(
        row_of(listed, {"q": "film", "all": ["great", "GREAT", "dull"], "right": ["GREAT", "great"]})
    )
    assert len(example.candidates) == 2 and example.right == (0,)  # the same thing twice is one option


def test_options_without_tokens_or_room_are_refused(tmp_path):
    task = task_of(tmp_path, CHOICE | {"options": ["{a}", "{b}"]})
    row = row_of(task, {"q": "film", "a": "\u200b", "b": "x", "label": 0})
    with pytest.raises(InputError, match="the option '.u200b' adds no token to the prompt 'film'; give a word"):
        task.bind(Lower(), None).encode(row)
    row = row_of(task, {"q": "film", "a": "great " * 70, "b": "x", "label": 0})
    with pytest.raises(InputError, match="the option 'great great.* takes .* tokens, and the model sees at most 64"):
        task.bind(make_tokenizer(), None).encode(row)


def test_an_option_without_its_space_is_warned_of(tmp_path):
    (line, _) = task_of(tmp_path, CHOICE | {"options": ["{a}", "{b}"]}).bind(make_tokenizer(), None).warnings
    assert "the option 'a' does not begin with a space: the model reads 'aa'" in line
    assert task_of(tmp_path, CHOICE).bind(make_tokenizer(), None).warnings == ()


def test_a_task_file_is_a_choice_with_all_it_says(tmp_path):
    content = CHOICE | {"score": "sum", "objective": "accuracy", "hub_path": "x/y", "hub_revision": "main", "num_dev": 7}
    task = task_of(tmp_path, content)
    assert isinstance(task, ChoiceTask) and task.num_dev == 7 and task.name == "mine"
    bound = task.bind(make_tokenizer(), None)
    assert bound.details == {"score": "sum", "objective": "accuracy"} and not bound.differentiable
    write_jsonl(tmp_path / "train.jsonl", [{"q": "film is", "a": "great", "b": "dull", "label": 1}])
    (row,) = task.rows("train", str(tmp_path))
    assert row.prompt == "film is" and row.right == (1,)


class Lower:
    """A tokenizer that knows lower-case letters and spaces alone."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": [1 + ord(c) for c in text.lower() if c.isascii()]})()

    def decode(self, ids):
        return "".join(chr(i - 1) for i in ids)
