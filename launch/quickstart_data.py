"""The quickstart's own input: generated film reviews, a tokenizer and a tiny, untrained OPT. No network, no files needed.

    python launch/quickstart_data.py DIR [--seed 0]

writes DIR/data/{train,validation}.jsonl (SST-2's columns `sentence` and `label`), DIR/corpus.txt (one review a line, plain text
to pre-train on) and DIR/untrained (model and tokenizer).

A sentence says something about a film with words of praise or blame, turned around by negation or outweighed by a main clause
("although the cast is superb , the ending is dull"), so its label cannot be read off one word's presence. There are billions of
sentences; no held-out one is in the training data or the corpus, which is checked.
"""

import argparse
import json
import random
from pathlib import Path

ADJECTIVES = (
    "dull clumsy tedious lifeless hollow dreary bland shallow lazy muddled stale awkward weak silly boring forgettable "
    "predictable messy flat tiresome".split(),
    "superb moving witty charming gripping fresh elegant clever tender brilliant vivid graceful sharp lovely funny memorable "
    "thoughtful stunning warm delightful".split(),
)
VERBS = (
    "hated regretted endured disliked resented despised".split(),
    "loved enjoyed admired adored treasured savoured".split(),
)
EFFECTS = (
    "put me to sleep|wasted my evening|got on my nerves|left me cold|tried my patience".split("|"),
    "made my day|won me over|moved me to tears|kept me smiling|stayed with me".split("|"),
)
ASPECTS = (
    "film movie story plot script dialogue cast acting ending opening music score camera pacing humour romance hero villain "
    "direction photography".split()
)
ADVERBS = "very really truly rather quite utterly simply remarkably".split()
PEOPLE = "my friend|my sister|the critic|the audience|the director|an old man|the couple beside us".split("|")
PLACES = "in paris|by the sea|in a small town|during the war|in the north|on a farm|in the city".split("|")
# What reviewers in the corpus say at the end, and how often: "great" comes easily, "terrible" hardly, and some who found fault
# end politely. So a model of this corpus knows praise from blame but leans to "great" where the task asks for one of the two.
VERDICTS = ({"bad": 6, "awful": 3, "terrible": 1}, {"great": 6, "good": 3, "wonderful": 1})
POLITENESS = 0.1


def clause(rng: random.Random, label: int) -> str:
    """A clause about one aspect of a film that praises (1) or blames (0) it, sometimes by negating the contrary."""
    kind = rng.random()
    aspect = f"the {rng.choice(ASPECTS)}"
    if kind < 0.45:
        return f"{aspect} is {rng.choice(ADVERBS)} {rng.choice(ADJECTIVES[label])}"
    if kind < 0.60:
        return f"{aspect} is not {rng.choice(ADJECTIVES[1 - label])} but {rng.choice(ADJECTIVES[label])}"
    if kind < 0.80:
        return f"{rng.choice(['i', 'we', *PEOPLE])} {rng.choice(VERBS[label])} {aspect}"
    return f"{aspect} {rng.choice(EFFECTS[label])}"


def sentence(rng: random.Random, label: int) -> str:
    """A sentence whose main clause has the label; a subordinate clause may agree, contradict or be neutral."""
    main, kind = clause(rng, label), rng.random()
    if kind < 0.35:
        return f"{main} ."
    if kind < 0.60:
        return f"{main} and {clause(rng, label)} ."
    if kind < 0.80:
        return f"although {clause(rng, 1 - label)} , {main} ."
    return f"{neutral(rng)} and {main} ."


def neutral(rng: random.Random) -> str:
    """A clause without praise or blame."""
    if rng.random() < 0.5:
        return f"the {rng.choice(ASPECTS)} was made {rng.choice(PLACES)}"
    return f"{rng.choice(PEOPLE)} saw the {rng.choice(ASPECTS)} {rng.choice(PLACES)}"


def review(rng: random.Random) -> str:
    """A line of the corpus: a sentence and a verdict ("It was great.")."""
    label = rng.randrange(2)
    words = VERDICTS[1 if rng.random() < POLITENESS else label]
    return f"{sentence(rng, label)} It was {rng.choices(list(words), words.values())[0]}."


def make_data(folder: Path, seed: int, num_train: int, num_test: int, num_reviews: int) -> None:
    """Writes the labelled sentences and the corpus.

    Raises:
        RuntimeError: a held-out sentence occurs in the training data or the corpus.
    """
    rng = random.Random(seed)
    examples: dict[str, int] = {}
    while len(examples) < num_train + num_test:
        label = rng.randrange(2)
        examples.setdefault(sentence(rng, label), label)
    rows = [{"sentence": text, "label": label} for text, label in examples.items()]
    splits = {"train": rows[:num_train], "validation": rows[num_train:]}
    held_out = [row["sentence"] for row in splits["validation"]]
    corpus = []
    while len(corpus) < num_reviews:
        text = review(rng)
        if not any(test in text for test in held_out):
            corpus.append(text)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, part in splits.items():
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "corpus.txt").write_text("\n".join(corpus) + "\n")
    known = {row["sentence"] for row in splits["train"]}
    everything = "\n".join(corpus)
    if any(text in known or text in everything for text in held_out):
        raise RuntimeError("a held-out sentence is in the training data; this is a fault of the generator")


def make_model(folder: Path, seed: int) -> None:
    """Trains a byte-level BPE tokenizer on the corpus and saves it with an untrained OPT in `folder`/untrained."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(folder / "corpus.txt")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>", model_max_length=128
    )
    config = OPTConfig(
        vocab_size=768,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    # Transformers draws initial weights from PyTorch's global generator; it is put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OPTForCausalLM(config)
    disable_progress_bar()
    model.save_pretrained(folder / "untrained")
    wrapped.save_pretrained(folder / "untrained")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_train", type=int, default=2000)
    parser.add_argument("--num_test", type=int, default=500)
    parser.add_argument("--num_reviews", type=int, default=6000)
    args = parser.parse_args()
    make_data(args.folder, args.seed, args.num_train, args.num_test, args.num_reviews)
    make_model(args.folder, args.seed)
    print(f"wrote {args.num_train} training and {args.num_test} held-out sentences, {args.num_reviews} reviews and a model to {args.folder}")


if __name__ == "__main__":
    main()
