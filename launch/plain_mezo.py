"""MeZO as it is run without ZeRO-3: the whole model on one device, its weights perturbed in place. What a user would take
instead of this project; launch/benchmark.py runs it beside the others.

    python launch/plain_mezo.py --model_name_or_path facebook/opt-125m --task sst2 --max_steps 1000 --output_dir outputs/plain

Takes launch/finetune.py's arguments but for the DeepSpeed JSON, on one rank, and writes the same files.
"""

import ds_zoadamu.distributed.quiet  # noqa: F401
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.training.arguments import finetune_parser
from ds_zoadamu.training.main import run_script
from ds_zoadamu.training.plain import PlainMeZO, make_plain_plan
from ds_zoadamu.training.profile import profile
from ds_zoadamu.training.run import finetune


def main() -> int:
    args = finetune_parser().parse_args()
    task = profile if args.profile_steps else finetune
    return run_script(lambda: task(args, make_plain_plan, PlainMeZO))


if __name__ == "__main__":
    run_command(main)
