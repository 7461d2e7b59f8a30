"""Accuracy of a language model on a prompt task, without training; under the deepspeed launcher or alone.

python launch/evaluate.py --model_name_or_path facebook/opt-125m --task sst2
deepspeed --num_gpus 2 launch/evaluate.py --model_name_or_path outputs/sst2/model --task sst2 --output_file accuracy.json
"""

from ds_zoadamu.cli import console

if __name__ == "__main__":
    console("evaluate")
