"""Greedy generation in micro-batches against one forward a token without padding and cache."""

import pytest
import torch

from ds_zoadamu.tasks.greedy import generate
from tests.helpers.harness import run_ranks
from tests.helpers.models import tiny_opt
from tests.helpers.tiny_lm import make_model

CONTEXTS = [[2, 5, 9], [2, 40, 41, 42, 43, 44, 45, 46], [2], [2, 7, 7, 7, 7]]


class Letters:
    """A tokenizer whose token n is written "n "; some end a line."""

    eos_token_id = None

    def __init__(self, line_ends=(), eos=None):
        self._line_ends, self.eos_token_id = line_ends, eos

    def decode(self, ids, skip_special_tokens=False):
        kept = [token for token in ids if not (skip_special_tokens and token == self.eos_token_id)]
        return "".join(f"{token}\nx" if token in self._line_ends else f"{token} " for token in kept)

    def batch_decode(self, rows, skip_special_tokens=False):
        return [self.decode(row, skip_special_tokens) for row in rows]


@pytest.fixture(scope="module")
def model():
    return make_model(tie_word_embeddings=False)  # tied, it would say its last token again and again


def plainly(model, context, longest, ends=()):
    ids = list(context)
    for _ in range(longest):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(context) :]


def test_a_micro_batch_is_its_rows(model):
    expected = [" ".join(map(str, plainly(model, context, 6))) for context in CONTEXTS]
    model.generation_config.eos_token_id = None
    assert generate(model, Letters(), CONTEXTS, 6, 1) == expected
    assert generate(model, Letters(), CONTEXTS[::-1], 6, 0) == expected[::-1]
    assert [generate(model, Letters(), [context], 6, 1)[0] for context in CONTEXTS] == expected


def test_it_ends_at_a_line_end_or_an_end_token(model):
    model.generation_config.eos_token_id = None
    free = [plainly(model, context, 6) for context in CONTEXTS]
    third = free[1][2]
    assert third not in free[1][:2]
    until = [row[: row.index(third)] if third in row else row for row in free]
    texts = [" ".join(map(str, row)) for row in until]
    assert generate(model, Letters(eos=third), CONTEXTS, 6, 1)[1] == texts[1]
    # The token that ends the line has words before and behind the line's end.
    with_end = [(text + f" {third}").strip() if third in row else text for text, row in zip(texts, free, strict=True)]
    assert generate(model, Letters(line_ends=(third,)), CONTEXTS, 6, 1) == with_end
    # An end token that only the model's folder knows.
    model.generation_config.eos_token_id = [third]
    assert generate(model, Letters(), CONTEXTS, 6, 1)[1] == texts[1]
    model.generation_config.eos_token_id = None


def test_what_the_folder_says_of_sampling_and_penalties_is_not_followed(model):
    model.generation_config.eos_token_id = None
    expected = generate(model, Letters(), CONTEXTS, 6, 1)
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature, own.max_length, own.no_repeat_ngram_size = 5.0, True, 9.0, 3, 1
    assert generate(model, Letters(), CONTEXTS, 6, 1) == expected
    assert model.generation_config is own and own.repetition_penalty == 5.0


def _of_ranks(rank, world_size, folder):
    """Texts of a model in partitions whose rank 1 goes on when rank 0 has been done for long; the number of its forwards."""
    import deepspeed

    from ds_zoadamu.hf.models import load_model

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    model = load_model(str(folder), config).eval()
    engine, *_ = deepspeed.initialize(model=model, config=config)
    model.generation_config.eos_token_id = None
    count = []
    model.register_forward_hook(lambda *_: count.append(1))
    first = plainly(make_model(tie_word_embeddings=False), CONTEXTS[0], 1)
    contexts = [CONTEXTS[0]] if rank == 0 else CONTEXTS[1:]
    texts = generate(engine, Letters(line_ends=first if rank == 0 else ()), contexts, 6, 1)
    return texts, len(count)


@pytest.mark.ranks
def test_ranks_stay_in_step_whatever_they_write(model, tmp_path):
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    expected = [" ".join(map(str, plainly(model, context, 6))) for context in CONTEXTS]
    (short, forwards), (long, of_other) = run_ranks(2, _of_ranks, tmp_path)
    assert short == [expected[0].split()[0]] and long == expected[1:]
    assert forwards == of_other == 6


def test_engines_are_seen_through():
    model = tiny_opt().eval()
    wrapped = type("Engine", (), {"module": model})()
    assert generate(wrapped, Letters(), [[2, 3]], 3, 1) == generate(model, Letters(), [[2, 3]], 3, 1)
