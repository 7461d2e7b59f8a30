"""Fine-tune a causal language model on a prompt task, under the deepspeed launcher.

    deepspeed --num_gpus 2 launch/finetune.py --deepspeed --deepspeed_config ds_configs/cpu-small_zoadamu.json \
        --model_name_or_path facebook/opt-125m --task sst2 --max_steps 1000 --eval_steps 100 --output_dir outputs/sst2

The JSON's optimizer decides: "ZOAdaMU" trains with forward passes only, "AdamW" with DeepSpeed's ZeRO-3 and backward passes.
"""

import ds_zoadamu.distributed.quiet  # noqa: F401
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.training.arguments import finetune_parser
from ds_zoadamu.training.main import parse_arguments, run_script
from ds_zoadamu.training.profile import profile
from ds_zoadamu.training.run import finetune
from ds_zoadamu.training.search import find_lr


def main() -> int:
    args = parse_arguments(finetune_parser())
    task = find_lr if args.find_lr else profile if args.profile_steps else finetune
    return run_script(lambda: task(args), args.output_dir)


if __name__ == "__main__":
    run_command(main)
