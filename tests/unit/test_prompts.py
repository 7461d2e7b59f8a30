"""Prompts as token ids, micro-batches of them, and the task's loss against a plain computation one sequence at a time."""

import pytest
import torch

from ds_zoadamu.tasks import SST2, Example, InputError, PromptCollator, PromptEncoder, Task, model_max_length, prompt_loss
from ds_zoadamu.tasks.metrics import candidate_scores
from tests.tiny_lm import make_model, make_tokenizer

LONG_WORDS = Task(name="long", template="{sentence} It was", label_words={"0": " terrible", "1": " splendid", "2": " so so"})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return make_model()


def examples(task, *sentences):
    return [Example(task.template.format(sentence=text), index % task.num_labels) for index, text in enumerate(sentences)]


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
@pytest.mark.parametrize("task", [SST2, LONG_WORDS], ids=["one token", "several tokens"])
def test_scores_equal_the_plain_computation(model, tokenizer, task, wrap):
    items = examples(task, "film is great", "is", "film film film is dull and awful", "a")
    encoder = PromptEncoder(tokenizer, task, 64)
    batch = PromptCollator(tokenizer.pad_token_id)([encoder.encode(item) for item in items])
    with torch.no_grad():
        scores = candidate_scores(wrap(model), batch)
        loss, weight = prompt_loss(wrap(model), batch)
    expected = torch.stack([plain_scores(model, tokenizer, item, task) for item in items])
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
    encoded = PromptEncoder(tokenizer, SST2, 64).encode(Example("film It was", 1))
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

    assert model_max_length(object(), Unlimited(), None) is None


def test_a_prompt_without_any_token_before_the_word_is_refused(tokenizer):
    """Without a beginning token and with a word that merges into the only token nothing would predict the word."""

    class Merging:
        def __call__(self, text, add_special_tokens=True):
            return type("Encoding", (), {"input_ids": [hash(text) % 1000]})()

    task = Task(name="bare", template="{sentence}", label_words={"0": "x", "1": "y"})
    with pytest.raises(InputError, match="no token before the label words"):
        PromptEncoder(Merging(), task, None).encode(Example("a", 0))
