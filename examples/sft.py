"""TRL's SFTTrainer with zeroth-order steps on conversations.

python examples/sft.py
deepspeed --num_gpus 2 examples/sft.py --model Qwen/Qwen2.5-0.5B-Instruct --lora --learning_rate 1e-5 --max_steps 1000
"""

import datasets
import tiny
from trl import SFTConfig

import ds_zoadamu
from ds_zoadamu.hf import ZOAdaMUConfig, ZOSFTTrainer

options = tiny.arguments(__doc__).parse_args()
args = SFTConfig(
    output_dir=options.output_dir,
    max_steps=options.max_steps,
    per_device_train_batch_size=options.per_device_train_batch_size,
    gradient_accumulation_steps=options.gradient_accumulation_steps,
    learning_rate=options.learning_rate,
    max_length=128,
    logging_steps=5,
    save_steps=5,
    bf16=False,
    report_to=[],
)
conversations = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer.strip()}]}
    for text, answer in tiny.reviews(64, seed=1)
]
model, tokenizer = tiny.load(options.model, options.lora)
trainer = ZOSFTTrainer(
    model=model,
    args=args,
    train_dataset=datasets.Dataset.from_list(conversations),
    processing_class=tokenizer,
    zo=ZOAdaMUConfig(zo_eps=1e-3),
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model()
digest = ds_zoadamu.weights_digest(trainer.deepspeed)  # of all ranks together
if trainer.is_world_process_zero():
    print(f"weights {digest}")
