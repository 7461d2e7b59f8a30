"""Tasks, tables and splits: what is read, and what is refused by file, line, column and remedy."""

import json

import pytest

from ds_zoadamu.tasks import SST2, InputError, PromptTask, load_splits, load_task
from tests.helpers.tiny_lm import make_tokenizer, sentences, write_data, write_jsonl


def test_sst2_prompt_and_labels(tmp_path):
    rows = [{"sentence": "a joy ", "label": 1, "idx": 0}, {"sentence": "a bore", "label": 0, "idx": 1}]
    write_jsonl(tmp_path / "validation.jsonl", rows)
    examples = SST2.rows("validation", str(tmp_path))
    assert [(e.prompt, e.label) for e in examples] == [("a joy It was", 1), ("a bore It was", 0)]
    assert SST2.words == (" terrible", " great")


def test_csv_reads_as_json_lines_do(tmp_path):
    (tmp_path / "validation.csv").write_text('sentence,label,idx\n"good, and\nlong",1,0\nbad,0,1\n', encoding="utf-8")
    examples = SST2.rows("validation", str(tmp_path))
    assert [(e.prompt, e.label) for e in examples] == [("good, and\nlong It was", 1), ("bad It was", 0)]


def test_hub_reader_goes_through_datasets(tmp_path, monkeypatch):
    """`load_dataset` takes a folder for a hub name, so the path is tested without a network."""
    data = write_data(tmp_path / "hub")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = PromptTask(name="t", template=SST2.template, label_words=SST2.label_words, hub_path=str(data))
    assert task.rows("validation", None) == SST2.rows("validation", str(data))


def test_hub_failure_names_data_dir(tmp_path):
    task = PromptTask(name="t", template="{a}", label_words={"0": "x", "1": "y"}, hub_path=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="cannot load .*nowhere.*--data_dir"):
        task.rows("train", None)


def test_splits_are_disjoint_and_follow_the_seed(tmp_path):
    data = str(write_data(tmp_path))
    splits = load_splits(SST2, data, num_train=30, num_dev=20, seed=0)
    assert (len(splits["train"]), len(splits["dev"]), len(splits["test"])) == (30, 20, 21)
    assert not {e.prompt for e in splits["train"]} & {e.prompt for e in splits["dev"]}
    assert splits == load_splits(SST2, data, num_train=30, num_dev=20, seed=0)
    assert splits["train"] != load_splits(SST2, data, num_train=30, num_dev=20, seed=1)["train"]
    assert splits["test"] == SST2.rows("validation", data)


def test_repeated_texts_do_not_reach_the_development_set(tmp_path):
    rows = sentences(10, seed=0)
    write_jsonl(tmp_path / "train.jsonl", rows * 3)
    write_jsonl(tmp_path / "validation.jsonl", rows)
    splits = load_splits(SST2, str(tmp_path), num_train=8, num_dev=2, seed=0)
    assert not {e.prompt for e in splits["train"]} & {e.prompt for e in splits["dev"]}


def test_too_few_examples_names_the_counts(tmp_path):
    with pytest.raises(
        InputError, match="has 60, which gives 50 for training and 10 for development .* --num_train 50 and --num_dev 20"
    ):
        load_splits(SST2, str(write_data(tmp_path)), num_train=50, num_dev=20, seed=0)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"sentence": "fine"}', r"train.jsonl:3: column 'label' is missing; the row has 'sentence'"),
        ('{"text": "fine", "label": 1}', r"train.jsonl:3: column 'sentence' is missing; the row has 'text', 'label'"),
        ('{"sentence": "fine", "label": 2}', r"train.jsonl:3: column 'label' has the label 2; task 'sst2' knows 0, 1"),
        ('{"sentence": "fine", "label": null}', r"train.jsonl:3: column 'label' has the label None"),
        ('{"sentence": "  ", "label": 1}', r"train.jsonl:3: column 'sentence' is empty"),
        ('{"sentence": ["fine"], "label": 1}', r"train.jsonl:3: column 'sentence' must hold text, got \['fine'\]"),
        ('{"sentence": "fine", "label": 1', r"train.jsonl:3: not JSON .*one JSON object"),
        ("[1, 2]", r"train.jsonl:3: a JSON object is needed, got list"),
        (
            '{"sentence": "a \\ud800", "label": 1}',
            r"train.jsonl:3: column 'sentence' holds '.ud800', a lone surrogate, at position 2",
        ),
        ('{"sentence": NaN, "label": 1}', r"train.jsonl:3: column 'sentence' must hold text, got nan"),
        ('\ufeff{"sentence": "a", "label": 1}', r"train.jsonl:3: not JSON .*BOM"),
        ('{"sentence": "a\0", "label": 1}', r"train.jsonl:3: not JSON .*control character"),
        ('{"sentence": "a", "label": ' + "9" * 5000 + "}", r"train.jsonl:3: not JSON \(.*4300 digits"),
        ("[" * 100_000, r"train.jsonl:3: not JSON \(nested too deeply"),
        ('{"sentence": "a", "label": 1}\udcff', r"train.jsonl:3: not UTF-8: byte 0xff"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    good = json.dumps({"sentence": "fine", "label": 1})
    (tmp_path / "train.jsonl").write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        SST2.rows("train", str(tmp_path))


@pytest.mark.parametrize(
    "text, message",
    [
        ("sentence,label\nfine,1\nfine\n", "train.csv:3: 2 fields expected"),
        ("sentence,label\nfine,1,2\n", "train.csv:2: 2 fields expected"),
        ("text,label\nfine,1\n", "train.csv:2: column 'sentence' is missing"),
        ('sentence,label\n"fine,1\n', "train.csv:.*malformed CSV"),
        ("", "the train split of task 'sst2' is empty"),
        ("sentence,label\nfine,1\n\udcff,1\n", "train.csv:3: not UTF-8: byte 0xff"),
        ("sentence,label,sentence\nfine,1,good\n", "train.csv:1: the column 'sentence' stands there twice"),
        ("sentence,label\n" + "a" * 200_000 + ",1\n", "train.csv:2: malformed CSV: field larger"),
    ],
    ids=lambda value: value[:40],
)
def test_bad_csv_is_named(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        SST2.rows("train", str(tmp_path))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        SST2.rows("train", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="the train split is missing: looked for .*train.jsonl, .*train.json, .*train.csv"):
        SST2.rows("train", str(tmp_path))
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="train.jsonl:1: not UTF-8: byte 0xff"):
        SST2.rows("train", str(tmp_path))


def test_a_task_file_needs_no_code(tmp_path):
    (tmp_path / "topic.json").write_text(
        json.dumps(
            {
                "template": "{title}: {body} Topic:",
                "label_words": {"sports": " sports", "politics": " politics", "science": " science"},
                "label_column": "topic",
                "validation_file": "held_out.jsonl",
            }
        )
    )
    task = load_task(str(tmp_path / "topic.json"))
    write_jsonl(tmp_path / "held_out.jsonl", [{"title": "Cup", "body": "They won.", "topic": "sports"}])
    (example,) = task.rows("validation", str(tmp_path))
    assert (task.name, example.prompt, example.label) == ("topic", "Cup: They won. Topic:", 0)
    with pytest.raises(InputError, match="not on the hub.*--data_dir"):
        task.rows("validation", None)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "one JSON object, got list"),
        ('{"template": "{a}"}', "the key 'label_words' is missing"),
        ('{"template": "{a}", "label_words": ["x", "y"], "labels": 1}', "unknown 'labels'"),
        ('{"template": "{a}", "label_words": "x"}', "label_words must be"),
        ('{"template": "{a}", "label_words": ["x"]}', "at least two labels"),
        ('{"template": "{a}", "label_words": ["x", " "]}', "empty word ' '"),
        ('{"template": "{a}", "label_words": ["x", "x"]}', "repeats a word"),
        ('{"template": "It was", "label_words": ["x", "y"]}', "names no column"),
        ('{"template": "{a} {", "label_words": ["x", "y"]}', "malformed"),
        ('{"template": "{} It", "label_words": ["x", "y"]}', "no column name"),
        ('{"template": "", "label_words": ["x", "y"]}', "template must be a non-empty string"),
    ],
)
def test_a_bad_task_file_is_refused(tmp_path, content, message):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_task(str(tmp_path / "task.json"))


def test_unknown_tasks_are_named(tmp_path):
    with pytest.raises(InputError, match="unknown task 'sst3'; known: sst2"):
        load_task("sst3")
    with pytest.raises(InputError, match="cannot read the task file .*missing.json"):
        load_task(str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    "change", [{"template": "{a} \ud800"}, {"label_words": {"0": " x", "1": " \ud800"}}, {"name": "\udcff"}]
)
def test_a_task_is_text(change):
    with pytest.raises(InputError, match="lone surrogate.*position"):
        PromptTask(**{"name": "t", "template": "{a}", "label_words": {"0": " x", "1": " y"}, **change})


def test_a_file_may_begin_with_a_byte_order_mark_and_end_its_lines_in_any_way(tmp_path):
    rows = [json.dumps({"sentence": f"s{i}", "label": i % 2}) for i in range(4)]
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + "{}\r\n{}\r{}\n{}".format(*rows).encode())
    assert [e.label for e in SST2.rows("train", str(tmp_path))] == [0, 1, 0, 1]
    (tmp_path / "validation.csv").write_bytes(b"\xef\xbb\xbfsentence,label\r\na,1\r\n")
    assert [e.label for e in SST2.rows("validation", str(tmp_path))] == [1]


def test_majority_accuracy(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"sentence": f"s{i}", "label": int(i < 7)} for i in range(10)])
    task = SST2.bind(make_tokenizer(), None)
    examples = [task.encode(row) for row in SST2.rows("train", str(tmp_path))]
    assert task.baseline(examples) == 0.7 and list(task.remarks("training", examples)) == []
    (remark,) = task.remarks("development", [example for example in examples if example.label == 0])
    assert remark == "no development example has the label of ' great': scores on that set say nothing of it"
