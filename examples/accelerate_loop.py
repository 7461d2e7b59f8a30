"""A training loop of one's own with accelerate and its DeepSpeed plugin.

    python examples/accelerate_loop.py
    deepspeed --num_gpus 2 examples/accelerate_loop.py --model facebook/opt-125m --learning_rate 1e-6 --max_steps 1000

Two things differ from a loop with gradients: ``prepare`` is called inside ``zeroth_order()``, and ``engine.train_batch`` takes
the place of forward, ``accelerator.backward`` and ``optimizer.step``.
"""

from pathlib import Path

import tiny
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, DeepSpeedPlugin, set_seed

import ds_zoadamu
from ds_zoadamu.hf import ZOAdaMUConfig, zeroth_order

options = tiny.arguments(__doc__).parse_args()
rule = ZOAdaMUConfig(lr=options.learning_rate, total_steps=options.max_steps, seed=0, weight_decay=0.0)
config = rule.config() | {
    "train_micro_batch_size_per_gpu": options.per_device_train_batch_size,
    "gradient_accumulation_steps": options.gradient_accumulation_steps,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
}
PartialState(cpu=not torch.cuda.is_available())  # without this accelerate takes several ranks on CPU for one
accelerator = Accelerator(
    deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
    # The same order of the data on any number of ranks.
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
)
set_seed(0)
model, tokenizer = tiny.load(options.model, options.lora)
texts = [text + answer for text, answer in tiny.reviews(64, seed=1)]


def collate(rows):
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    return dict(batch) | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


data = torch.utils.data.DataLoader(texts, options.per_device_train_batch_size, shuffle=True, collate_fn=collate)
with zeroth_order():
    engine, data = accelerator.prepare(model, data)
journal = Path(options.output_dir) / "journal.jsonl"
if options.resume and journal.exists():
    step = engine.resume(journal).step
else:
    engine.open_journal(journal)
    step = 0
steps_an_epoch = len(data) // options.gradient_accumulation_steps
while step < options.max_steps:
    epoch, taken = divmod(step, steps_an_epoch)
    data.set_epoch(epoch)  # its order is that of its number, also behind a resume
    batches = iter(accelerator.skip_first_batches(data, taken * options.gradient_accumulation_steps))
    for _ in range(steps_an_epoch - taken):
        loss = engine.train_batch(batches)
        step += 1
        if step % 5 == 0:
            accelerator.print(f"step {step}: loss {loss:.4f}")
        if step == options.max_steps:
            break
engine.close_journal()
ds_zoadamu.save_pretrained(engine, Path(options.output_dir) / "model", tokenizer, overwrite=True)
accelerator.print(f"weights {ds_zoadamu.weights_digest(engine)}")
