"""Demonstrations before a prompt, against examples written out by hand."""

from collections import Counter

import pytest
import transformers

from ds_zoadamu.tasks import TASKS, InputError
from ds_zoadamu.tasks.demonstrations import with_demonstrations
from tests.helpers.hub_rows import BY_HAND
from tests.helpers.tokenizers_of_tests import llama_like, opt_like


def rows_of(task):
    return [TASKS[task].row(f"row {number}", asked.row) for number, asked in enumerate(BY_HAND[task])]


@pytest.mark.parametrize("task", ("sst2", "rte", "cb", "boolq", "copa", "record", "squad", "drop"))
def test_a_demonstration_is_the_prompt_with_its_answer(task):
    for row, asked in zip(rows_of(task), BY_HAND[task], strict=True):
        right = asked.right if isinstance(asked.right, int) else asked.right[0]
        option = asked.options[0] if task in ("squad", "drop") else asked.options[right]
        assert TASKS[task].demonstration(row) == (asked.prompt + option).strip()


def test_encoded_by_hand():
    """Two demonstrations, an empty line behind each, then the prompt; cut from the left, the first token of the model stays."""
    task = TASKS["sst2"]
    row = task.row("", {"sentence": "so good", "label": 1})
    pool = [task.row("", {"sentence": text, "label": label}) for text, label in (("dull", 0), ("fine film", 1), ("so good", 1))]
    (made,) = with_demonstrations(task, [row], pool, 2, seed=0)
    first, second = "dull It was terrible", "fine film It was great"  # never the row itself
    assert made.prompt in (f"{first}\n\n{second}\n\nso good It was", f"{second}\n\n{first}\n\nso good It was")
    assert made.label == 1
    for make in (opt_like, llama_like):
        tokenizer = make([made.prompt + " great", made.prompt + " terrible"])
        config = transformers.OPTConfig(vocab_size=len(tokenizer), max_position_embeddings=512)
        whole = task.bind(tokenizer, config).encode(made)
        start = tokenizer("a").input_ids[:1]
        body = tokenizer(made.prompt, add_special_tokens=False).input_ids
        assert list(whole.context) == start + body and whole.label == 1
        short = task.bind(tokenizer, config, max_length=12).encode(made)
        assert list(short.context) == start + body[-11:]  # an option's token is predicted, not read


def test_draws_are_each_rows_own_and_repeatable():
    task = TASKS["sst2"]
    pool = [task.row("", {"sentence": f"film {number}", "label": number % 2}) for number in range(30)]
    rows = [task.row("", {"sentence": f"test {number}", "label": 0}) for number in range(40)]
    made = with_demonstrations(task, rows, pool, 4, seed=0)
    drawn = [tuple(row.prompt.split("\n\n")[:-1]) for row in made]
    assert all(len(set(of_one)) == 4 for of_one in drawn) and len(set(drawn)) > 35
    assert set(Counter(text for of_one in drawn for text in of_one)) == {task.demonstration(row) for row in pool}
    # Whatever the order, and whichever other rows there are.
    assert with_demonstrations(task, rows[::-1][:7], pool, 4, seed=0) == made[::-1][:7]
    assert with_demonstrations(task, rows, pool, 4, seed=1) != made


def test_refused():
    task = TASKS["boolq"]
    pool = rows_of("boolq")
    with pytest.raises(
        InputError, match="--demonstrations 2: the training split of task 'boolq' has 1 rows that are not asked"
    ):
        with_demonstrations(task, pool[:1], pool, 2, seed=0)
    with pytest.raises(InputError, match="--demonstrations: task 'text' has no answers to show"):
        with_demonstrations(TASKS["text"], [], [], 1, seed=0)
