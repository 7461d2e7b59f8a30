"""Gives the quickstart's tiny OPT some knowledge of its language: next-token training with DeepSpeed's Adam on ZeRO-3.

    deepspeed --num_gpus 2 launch/quickstart_pretrain.py --deepspeed_config ds_configs/cpu-small_adamw.json \
        --model_name_or_path DIR/untrained --corpus DIR/corpus.txt --output_dir DIR/pretrained
"""

import argparse
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm as dist
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

import ds_zoadamu
from ds_zoadamu.config import load
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.distributed.start import launched_rank, launched_world_size
from ds_zoadamu.training.main import run_script
from ds_zoadamu.zero3.data import MicroBatchSampler, repeat


def blocks(tokenizer, path: Path, length: int) -> torch.Tensor:
    """The corpus as int64 [blocks, length]: reviews one after the other, each with its beginning token."""
    ids = [token for line in path.read_text().splitlines() for token in tokenizer(line).input_ids]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).reshape(count, length)


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A micro-batch for a causal language model's own loss."""
    input_ids = torch.stack(rows)
    return {"input_ids": input_ids, "labels": input_ids}


def pretrain(args: argparse.Namespace) -> None:
    model_info = AutoConfig.from_pretrained(args.model_name_or_path)
    config = load(args.deepspeed_config, world_size=launched_world_size(), model_info=model_info, overrides=args)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    data = blocks(tokenizer, args.corpus, length=64)
    model = ds_zoadamu.load_model(args.model_name_or_path, config=config)
    engine, *_ = ds_zoadamu.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    sampler = MicroBatchSampler(
        len(data),
        engine.train_micro_batch_size_per_gpu(),
        engine.gradient_accumulation_steps(),
        dist.get_rank(),
        dist.get_world_size(),
        0,
    )
    batches = repeat(torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=collate))
    engine.train()
    with tqdm(range(args.max_steps), desc="pre-training", unit="step", disable=launched_rank() != 0) as bar:
        for _ in bar:
            loss = engine(**next(batches)).loss
            engine.backward(loss)
            engine.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    ds_zoadamu.save_pretrained(engine, args.output_dir, tokenizer, overwrite=args.overwrite_output_dir)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--overwrite_output_dir", action="store_true")
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--per_device_train_batch_size", type=int, default=16)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = deepspeed.add_config_arguments(parser).parse_args()
    return run_script(lambda: pretrain(args))


if __name__ == "__main__":
    run_command(main)
