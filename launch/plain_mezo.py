"""MeZO as it is run without ZeRO-3: the whole model on one device, its weights perturbed in place. What a user would take
instead of this project; launch/benchmark.py runs it beside the others.

    python launch/plain_mezo.py --model_name_or_path facebook/opt-125m --task sst2 --max_steps 1000 --output_dir outputs/plain

Takes launch/finetune.py's arguments but for the DeepSpeed JSON, on one rank, and writes the same files.
"""

from ds_zoadamu.cli import console

if __name__ == "__main__":
    console("plain_mezo")
