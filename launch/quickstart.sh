#!/usr/bin/env bash
# The main job from nothing, on a CPU, without a network but for the packages: makes a sentiment task and a tiny OPT that half
# knows it, fine-tunes the model on 2 ranks with ZO-AdaMU, and ends with a table of what came of it.
#
#   bash launch/quickstart.sh [OUTPUT_FOLDER]      default: outputs/quickstart
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$repository"

out=${1:-outputs/quickstart}
ranks=2
cores=$(nproc)
# A rank's threads; more than its share of the cores would make the ranks wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores >= 2 * ranks ? cores / ranks : 1))}
export DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore::FutureWarning
SECONDS=0

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

launch() {
    deepspeed --quiet --num_gpus "$ranks" --master_port "$(free_port)" "$@"
}

echo "1/3 sentences, tokenizer and an untrained model"
python launch/quickstart_data.py "$out"

echo "2/3 a moment of pre-training (DeepSpeed's Adam on ZeRO-3, backward passes)"
launch launch/quickstart_pretrain.py --deepspeed --deepspeed_config ds_configs/cpu-small_adamw.json \
    --model_name_or_path "$out/untrained" --corpus "$out/corpus.txt" --output_dir "$out/pretrained" --overwrite_output_dir

echo "3/3 fine-tuning (ZO-AdaMU on ZeRO-3, forward passes only)"
launch launch/finetune.py --deepspeed --deepspeed_config ds_configs/cpu-small_zoadamu.json \
    --model_name_or_path "$out/pretrained" --task sst2 --data_dir "$out/data" \
    --learning_rate 1e-4 --max_steps 1000 --eval_steps 100 --output_dir "$out/finetuned" --overwrite_output_dir
echo "quickstart: done in $SECONDS s"
