"""Transformers' Trainer with zeroth-order steps: a causal language model learns to answer reviews.

    python examples/trainer.py                          # one device, a tiny model that is made on the spot
    deepspeed --num_gpus 2 examples/trainer.py --model facebook/opt-125m --learning_rate 1e-6 --max_steps 1000

Two lines differ from a script with ``transformers.Trainer``: the import, and ``zo=``.
"""

import numpy
import tiny
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import ds_zoadamu
from ds_zoadamu.hf import ZOAdaMUConfig, ZOTrainer


def encode(tokenizer, rows):
    """Only the answer is learnt."""
    encoded = []
    for text, answer in rows:
        prompt, target = tokenizer(text)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
        encoded.append({"input_ids": prompt + target, "labels": [-100] * len(prompt) + target})
    return encoded


def accuracy(prediction):
    """The share of answer tokens that the model finds most likely."""
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": float(numpy.mean(guesses[labels != -100] == labels[labels != -100]))}


options = tiny.arguments(__doc__).parse_args()
args = TrainingArguments(
    output_dir=options.output_dir,
    max_steps=options.max_steps,
    per_device_train_batch_size=options.per_device_train_batch_size,
    gradient_accumulation_steps=options.gradient_accumulation_steps,
    learning_rate=options.learning_rate,
    eval_strategy="steps",
    eval_steps=5,
    save_steps=5,
    logging_steps=5,
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    report_to=[],
)
model, tokenizer = tiny.load(options.model, options.lora)
trainer = ZOTrainer(
    model=model,
    args=args,
    train_dataset=encode(tokenizer, tiny.reviews(64, seed=1)),
    eval_dataset=encode(tokenizer, tiny.reviews(24, seed=2)),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    compute_metrics=accuracy,
    preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    zo=ZOAdaMUConfig(zo_eps=1e-3, momentum={"dtype": "int8"}),
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model()
print(trainer.evaluate())
digest = ds_zoadamu.weights_digest(trainer.deepspeed)  # of all ranks together
if trainer.is_world_process_zero():
    print(f"weights {digest}")
