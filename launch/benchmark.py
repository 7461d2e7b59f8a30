"""Optimizers side by side: the same model, task and budget, each in processes of its own under the deepspeed launcher.

    python launch/benchmark.py --model_name_or_path facebook/opt-125m --task sst2 --ranks 2 --max_steps 1000 \
        --lr_grid 3e-6,1e-5,3e-5 adamw=1e-6,5e-6,1e-5 --output_dir outputs/benchmark

Started without a launcher. Interrupted, the same command goes on. What the report says: docs/benchmark.md.
"""

from ds_zoadamu.cli import console

if __name__ == "__main__":
    console("benchmark")
