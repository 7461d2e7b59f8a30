"""Accuracy of a causal language model on a prompt task, without training; under the deepspeed launcher or alone.

python launch/evaluate.py --model_name_or_path facebook/opt-125m --task sst2
deepspeed --num_gpus 2 launch/evaluate.py --model_name_or_path outputs/sst2/model --task sst2 --output_file accuracy.json
"""

import ds_zoadamu.distributed.quiet  # noqa: F401
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.training.arguments import evaluate_parser
from ds_zoadamu.training.main import parse_arguments, run_script
from ds_zoadamu.training.measure import measure


def main() -> int:
    args = parse_arguments(evaluate_parser())
    return run_script(lambda: measure(args))


if __name__ == "__main__":
    run_command(main)
