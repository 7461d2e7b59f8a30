"""Fine-tune a language model on a prompt task, under the deepspeed launcher.

    deepspeed --num_gpus 2 launch/finetune.py --deepspeed --deepspeed_config ds_configs/cpu-small_zoadamu.json \
        --model_name_or_path facebook/opt-125m --task sst2 --max_steps 1000 --eval_steps 100 --output_dir outputs/sst2

The JSON's optimizer decides: "ZOAdaMU" trains with forward passes only, "AdamW" with DeepSpeed's ZeRO-3 and backward passes.
"""

from ds_zoadamu.cli import console

if __name__ == "__main__":
    console("finetune")
