"""A reward on generated text, as GRPO has it, maximised without a gradient: the loss is minus the mean reward of a group of
sampled answers to each prompt.

    python examples/reward.py
    deepspeed --num_gpus 2 examples/reward.py --model Qwen/Qwen2.5-0.5B-Instruct --lora --learning_rate 1e-5 --max_steps 1000

No log-probabilities, no reference model, no value model: a step is two generations, with the weights moved in one direction
and in the other. Both sample with the same random numbers, so that their rewards differ by the weights alone.
"""

from pathlib import Path

import tiny
import torch

import ds_zoadamu
from ds_zoadamu.hf import ZOAdaMUConfig

GROUP, LENGTH = 4, 8  # answers to a prompt, and their longest length in tokens


def reward(answer: str) -> float:
    """Of one answer; put your own here. This one likes letters: the share of them."""
    return sum(letter.isascii() and letter.isalpha() for letter in answer) / max(1, len(answer))


def collate(rows):
    """Prompts end where answers begin, so they are padded on the left. The seed belongs to the rows: the same answers are
    sampled on whatever rank."""
    seeds, texts = zip(*rows, strict=True)
    return dict(tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt")) | {"seed": seeds[0]}


def minus_reward(module, batch):
    """The loss and its weight, the number of prompts; nothing in it need be differentiable."""
    prompts = {name: batch[name].to(module.device) for name in ("input_ids", "attention_mask")}
    torch.manual_seed(batch["seed"])  # the engine puts generators back behind a step
    tokens = module.generate(
        **prompts, do_sample=True, num_return_sequences=GROUP, max_new_tokens=LENGTH, pad_token_id=tokenizer.pad_token_id
    )
    answers = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return -torch.tensor([reward(answer) for answer in answers]).mean(), len(prompts["input_ids"])


options = tiny.arguments(__doc__).parse_args()
rule = ZOAdaMUConfig(lr=options.learning_rate, total_steps=options.max_steps, zo_eps=1e-2, seed=0, weight_decay=0.0)
config = rule.config() | {
    "train_micro_batch_size_per_gpu": options.per_device_train_batch_size,
    "gradient_accumulation_steps": options.gradient_accumulation_steps,
    "steps_per_print": 5,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
}
model, tokenizer = tiny.load(options.model, options.lora)
prompts = [(number, text) for number, (text, _) in enumerate(tiny.reviews(64, seed=1))]
engine, _, data, _ = ds_zoadamu.initialize(
    model=model, config=config, training_data=prompts, collate_fn=collate, loss_fn=minus_reward
)
journal = Path(options.output_dir) / "journal.jsonl"
if options.resume and journal.exists():
    engine.resume(journal)
else:
    engine.open_journal(journal)
batches = iter(data)
while engine.global_steps < options.max_steps:
    try:
        engine.train_batch(batches)
    except StopIteration:  # on all ranks together
        batches = iter(data)
engine.close_journal()
digest = ds_zoadamu.weights_digest(engine)
if not options.lora:  # adapters are rebuilt from the journal
    ds_zoadamu.save_pretrained(engine, Path(options.output_dir) / "model", tokenizer, overwrite=True)
if engine.global_rank == 0:
    print(f"weights {digest}")
