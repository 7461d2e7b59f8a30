"""TRL's DPOTrainer with zeroth-order steps on pairs of a chosen and a rejected answer.

    python examples/dpo.py
    deepspeed --num_gpus 2 examples/dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --lora --learning_rate 1e-5 --max_steps 1000

The reference's log-probabilities are worked out once, before training, and not in both passes of every step. TRL
shares them between ranks in the data set's cache, so the data set has to be one from disk.
"""

import tiny
from trl import DPOConfig

import ds_zoadamu
from ds_zoadamu.hf import ZOAdaMUConfig, ZODPOTrainer

options = tiny.arguments(__doc__).parse_args()
args = DPOConfig(
    output_dir=options.output_dir,
    max_steps=options.max_steps,
    per_device_train_batch_size=options.per_device_train_batch_size,
    gradient_accumulation_steps=options.gradient_accumulation_steps,
    learning_rate=options.learning_rate,
    precompute_ref_log_probs=True,
    max_length=128,
    logging_steps=5,
    save_steps=5,
    bf16=False,
    report_to=[],
)
other = {" great": " terrible", " terrible": " great"}
pairs = [{"prompt": text, "chosen": answer, "rejected": other[answer]} for text, answer in tiny.reviews(64, seed=1)]
model, tokenizer = tiny.load(options.model, options.lora)
trainer = ZODPOTrainer(
    model=model,
    args=args,
    train_dataset=tiny.on_disk(pairs, options.output_dir),
    processing_class=tokenizer,
    zo=ZOAdaMUConfig(zo_eps=1e-3),
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model()
digest = ds_zoadamu.weights_digest(trainer.deepspeed)  # of all ranks together
if trainer.is_world_process_zero():
    print(f"weights {digest}")
