"""Prompts as token ids, micro-batches of them, and the task's loss against a plain computation one sequence at a time."""

from dataclasses import replace

import pytest
import torch

from ds_zoadamu.tasks import (
    SST2,
    InputError,
    PromptCollator,
    PromptEncoder,
    PromptRow,
    PromptTask,
    candidate_scores,
    model_max_length,
    padding_id,
)
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_model

LONG_WORDS = PromptTask(
    name="long", template="{sentence} It was", label_words={"0": " terrible", "1": " splendid", "2": " so so"}
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model()


def examples(task, *sentences):
    return [PromptRow(task.template.format(sentence=text), index % len(task.words)) for index, text in enumerate(sentences)]


def plain_scores(model, tokenizer, example, task):
    """Log-likelihood of each word: one unpadded forward a candidate, in the same words as the definition."""
    scores = []
    for word in task.words:
        start = len(tokenizer(example.prompt).input_ids)
        ids = torch.tensor([tokenizer(example.prompt + word).input_ids])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits.float().log_softmax(-1)
        scores.append(sum(log_probs[0, position - 1, ids[0, position]] for position in range(start, ids.shape[1])))
    return torch.stack(scores)


class AllLogits(torch.nn.Module):
    """A model whose forward knows nothing of ``logits_to_keep``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, use_cache):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("wrap", [lambda model: model, AllLogits], ids=["kept logits", "all logits"])
@pytest.mark.parametrize("score", ["mean", "sum"])
@pytest.mark.parametrize("task", [SST2, LONG_WORDS], ids=["one token", "several tokens"])
def test_scores_equal_the_plain_computation(model, tokenizer, task, score, wrap):
    items = examples(task, "film is great", "is", "film film film is dull and awful", "a")
    bound = replace(task, score=score).bind(tokenizer, model.config)
    batch = bound.collate([bound.encode(item) for item in items])
    with torch.no_grad():
        scores = candidate_scores(wrap(model), batch, score)
        loss, weight = bound.loss(wrap(model), batch)
    expected = torch.stack([plain_scores(model, tokenizer, item, task) for item in items])
    if score == "mean":
        expected = expected / torch.tensor([len(tokenizer(word, add_special_tokens=False).input_ids) for word in task.words])
    # fp32 with other matrix shapes: a few roundings on numbers of size 1 to 30.
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)
    labels = torch.tensor([item.label for item in items])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected, labels), rtol=1e-5, atol=1e-5)
    assert weight == len(items)


def test_one_token_words_share_a_row(tokenizer):
    encode = PromptEncoder(tokenizer, SST2, 64).encode
    batch = PromptCollator(1)([encode(item) for item in examples(SST2, "film", "film is")])
    assert batch["rows"].tolist() == [[0, 0], [1, 1]]
    encode = PromptEncoder(tokenizer, LONG_WORDS, 64).encode
    batch = PromptCollator(1)([encode(item) for item in examples(LONG_WORDS, "film", "film is")])
    assert batch["rows"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_padding_goes_right_and_depends_on_the_micro_batch_alone(tokenizer):
    encoder, collate = PromptEncoder(tokenizer, SST2, 64), PromptCollator(tokenizer.pad_token_id)
    short, long = (encoder.encode(item) for item in examples(SST2, "film", "film is great and great and great"))
    batch = collate([short, long])
    length = len(short.context)
    assert batch["input_ids"][0, :length].tolist() == list(short.context)
    assert batch["attention_mask"][0].tolist() == [1] * length + [0] * (len(long.context) - length)
    alone = collate([short])
    assert alone["input_ids"].shape == (1, length)
    assert all(torch.equal(alone[key], value) for key, value in collate([short]).items())


def test_prompts_begin_with_the_tokenizers_own_token(tokenizer):
    encoded = PromptEncoder(tokenizer, SST2, 64).encode(PromptRow("film It was", 1))
    assert encoded.context[0] == tokenizer.bos_token_id
    assert encoded.context == tuple(tokenizer("film It was").input_ids)
    assert [tokenizer.decode(ids) for ids in encoded.candidates] == [" terrible", " great"]


@pytest.mark.parametrize("task", [SST2, LONG_WORDS], ids=["one token", "several tokens"])
def test_long_texts_lose_their_beginning_not_the_prompt(tokenizer, task):
    (item,) = examples(task, "film is great and " * 40)
    encoded = PromptEncoder(tokenizer, task, 20).encode(item)
    longest_row = len(encoded.context) + max(map(len, encoded.candidates)) - 1
    assert longest_row == 20
    assert encoded.context[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded.context[1:]).endswith("It was")


def test_a_length_that_does_not_hold_the_prompt_is_refused(tokenizer):
    with pytest.raises(InputError, match="max_length 3 is too short for task 'sst2'.*--max_length"):
        PromptEncoder(tokenizer, SST2, 3)
    with pytest.raises(InputError, match="--max_length must be positive, got 0"):
        model_max_length(None, None, 0)


def test_max_length_is_the_least_known_limit(tokenizer, model):
    assert model_max_length(model.config, tokenizer, None) == 64
    assert model_max_length(model.config, tokenizer, 50) == 50

    class Unlimited:
        model_max_length = 10**30

    assert model_max_length(None, Unlimited(), None) is None


def test_a_prompt_without_any_token_before_the_word_is_refused(tokenizer):
    """Without a beginning token and with a word that merges into the only token nothing would predict the word."""

    class Merging:
        def __call__(self, text, add_special_tokens=True):
            return type("Encoding", (), {"input_ids": [hash(text) % 1000]})()

    task = PromptTask(name="bare", template="{sentence}", label_words={"0": "x", "1": "y"})
    with pytest.raises(InputError, match="no token before the label words"):
        PromptEncoder(Merging(), task, None).encode(PromptRow("a", 0))


def words_task(*words, template="{sentence} It was"):
    return PromptTask(name="words", template=template, label_words={str(index): word for index, word in enumerate(words)})


def lower_casing_tokenizer():
    """Whole words in lower case, as an uncased BERT's: four are known, the others are one and the same token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: index for index, word in enumerate(["[UNK]", "[PAD]", "a", "it", "was", "great", "bad", "fun"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize(
    "words, message",
    [
        ((" Great", " great"), r"' Great' and ' great' are the same tokens \[5\] .*'great'"),
        ((" bad", " splendid", " superb"), r"' splendid' and ' superb' are the same tokens \[0\] .*UNK"),
        ((" great", " \u200b"), r"the label word ' .u200b' adds no token to the prompt 'a It was'"),
    ],
)
def test_words_without_tokens_of_their_own_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        PromptEncoder(lower_casing_tokenizer(), words_task(*words), 64)


def test_words_that_are_the_same_tokens_behind_some_text_only_are_refused_there():
    """A template that ends with the text: what the words become depends on it."""

    class Merging:
        def __call__(self, text, add_special_tokens=True):
            ids = [9, *map(ord, text)] if not text.endswith(("!x", "!y")) else [9, 1]
            return type("Encoding", (), {"input_ids": ids})()

        def decode(self, ids):
            return str(ids)

    encoder = PromptEncoder(Merging(), words_task("x", "y", template="{sentence}"), None)
    encoder.encode(PromptRow("a", 0))
    with pytest.raises(InputError, match="'x' and 'y' are the same tokens"):
        encoder.encode(PromptRow("a!", 0))


def test_a_word_that_begins_another_is_warned_of(tokenizer, model):
    task = replace(words_task(" great", " great fun", " terrible"), score="sum")
    (line,) = PromptEncoder(tokenizer, task, 64).warnings
    assert "' great fun' begins with the tokens of ' great'" in line and "can never win" in line
    # What the warning says, on a model with random weights: the longer word wins for no text.
    encoded = [
        PromptEncoder(tokenizer, task, 64).encode(item) for item in examples(task, *("film", "is", "dull", "a great film"))
    ]
    with torch.no_grad():
        scores = candidate_scores(model, PromptCollator(1)(encoded), "sum")
    assert PromptEncoder(tokenizer, replace(task, score="mean"), 64).warnings == ()  # by their means it can
    assert (scores[:, 0] > scores[:, 1]).all()
    assert PromptEncoder(tokenizer, LONG_WORDS, 64).warnings == PromptEncoder(tokenizer, SST2, 64).warnings == ()


@pytest.mark.parametrize(
    "template, words, expected",
    [
        ("{sentence} It was", ("great", " terrible"), ["'great' does not begin with a space: the model reads 'a It wasgreat'"]),
        ("{sentence} Answer:", ("great", "terrible"), ["'great' does not begin", "'terrible' does not begin"]),
        ("{sentence} It was ", ("great", "terrible"), []),  # the space stands in the template
        ('{sentence} It was "', ("great", "terrible"), []),
        ("{sentence} It was", ("!", "?"), []),  # no words
        ("{sentence} \u60c5\u611f", ("\u597d", "\u5dee"), []),  # a script without spaces
    ],
)
def test_a_word_without_its_space_is_warned_of(tokenizer, template, words, expected):
    warnings = PromptEncoder(tokenizer, words_task(*words, template=template), 64).warnings
    assert len(warnings) == len(expected) and all(part in line for part, line in zip(expected, warnings, strict=True))
    # To a tokenizer that does without spaces they are the same.
    assert PromptEncoder(lower_casing_tokenizer(), words_task("great", "bad", template="{sentence} Answer:"), 64).warnings == ()


@pytest.mark.parametrize(
    "template, words, sentence, message",
    [
        (
            "{sentence} <new> It was",
            (" great", " bad"),
            "film",
            r"the prompt 'a <new> It was' has the token '<new>' with the id",
        ),
        ("{sentence} It was", (" great", " <new>"), "film", r"the label word ' <new>' has the token '<new>' with the id"),
        ("{sentence} It was", (" great", " bad"), "a <new> film", r"the prompt 'a <new> film It was' has the token '<new>'"),
    ],
)
def test_a_token_that_the_embedding_does_not_hold_is_refused(template, words, sentence, message):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    size, task = len(tokenizer) - 1, words_task(*words, template=template)
    with pytest.raises(InputError, match=message + rf".*holds {size}, ids 0 to {size - 1}"):
        PromptEncoder(tokenizer, task, 64, size).encode(PromptRow(template.format(sentence=sentence), 0))
    PromptEncoder(tokenizer, task, 64, size + 1).encode(PromptRow(template.format(sentence=sentence), 0))


@pytest.mark.parametrize("known, expected", [(7, 7), (8, 0), (-1, 0), (None, 0)])
def test_a_pad_id_that_the_embedding_does_not_hold_is_replaced(known, expected):
    tokenizer = type("Tokenizer", (), {"pad_token_id": known})()
    assert padding_id(tokenizer, 8) == expected
    assert padding_id(tokenizer, None) == (known if known in (7, 8) else 0)


def test_scores_do_not_depend_on_the_pad_id(tmp_path, model, tokenizer):
    """As the commands read a model whose tokenizer was given a padding token behind the end of the embedding."""
    from ds_zoadamu.training.arguments import evaluate_parser
    from ds_zoadamu.training.plan import read_model_input

    save_model(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.add_tokens([f"<{i}>" for i in range(model.config.vocab_size - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<behind the end>"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    tokenizer.save_pretrained(tmp_path)
    task = read_model_input(evaluate_parser().parse_args(["--model_name_or_path", str(tmp_path)])).task
    items = [task.encode(row) for row in examples(SST2, "film", "film film film is dull and awful")]
    with torch.no_grad():
        scores = candidate_scores(model, task.collate(items))
        expected = torch.cat([candidate_scores(model, task.collate([item])) for item in items])
    # Two rows in a matrix product instead of one.
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


def test_warnings_of_label_words_are_printed_by_rank_0_once(tmp_path, monkeypatch):
    from ds_zoadamu.training import plan
    from ds_zoadamu.training.arguments import evaluate_parser

    save_model(tmp_path)
    printed = []
    monkeypatch.setattr(plan.logger, "warning", printed.append)
    args = evaluate_parser().parse_args(["--model_name_or_path", str(tmp_path), "--label_words", "bad", " great"])
    for rank, count in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        plan.read_model_input(args)
        assert len(printed) == count
    assert "'bad' does not begin with a space" in printed[0]
