"""Short runs of the Trainer for its tests; what they return is small."""

import os
from pathlib import Path

import torch

from ..helpers.tiny_lm import make_model, make_tokenizer, sentences

MICRO_BATCHES_A_STEP = 4


def rows(count: int = 32, seed: int = 1) -> list[dict]:
    """Sentences of several lengths, as a causal language model takes them."""
    tokenizer = make_tokenizer()
    encoded = [tokenizer(row["sentence"])["input_ids"] for row in sentences(count, seed)]
    return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in encoded]


def adapted():
    """A model with LoRA adapters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def options(**changes):
    from ds_zoadamu.hf import ZOAdaMUConfig

    return ZOAdaMUConfig(**({"zo_eps": 1e-2, "t1": 1, "t2": 3, "t3": 6} | changes))


def arguments(folder, world_size: int, **changes):
    from transformers import TrainingArguments

    given = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": MICRO_BATCHES_A_STEP // world_size,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**given | changes)


class Died(Exception):
    """In the place of a kill."""


def dying(step: int):
    """A callback that ends the run behind a step, before anything of it is saved."""
    from transformers import TrainerCallback

    class Dying(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Died()

    return Dying()


def recording(seen: list):
    """A callback that keeps what reports are given."""
    from transformers import TrainerCallback

    class Recording(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs) | {"step": state.global_step})

    return Recording()


def trainer(folder, world_size: int, model=None, data=None, cls=None, zo=None, **changes):
    from transformers import DataCollatorForSeq2Seq

    from ds_zoadamu.hf import ZOTrainer

    own = {key: changes.pop(key) for key in ("eval_dataset", "callbacks", "compute_metrics", "journal") if key in changes}
    tokenizer = make_tokenizer()
    given = {
        "model": make_model(num_hidden_layers=1) if model is None else model,
        "args": arguments(folder, world_size, **changes),
        "train_dataset": rows() if data is None else data,
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "processing_class": tokenizer,
    }
    if "deepspeed" not in changes:
        given["zo"] = options() if zo is None else zo
    return (cls or ZOTrainer)(**given | own)


def trained(made, **how) -> str:
    """Trains; the weights' digest."""
    from ds_zoadamu import weights_digest

    made.train(**how)
    return weights_digest(made.deepspeed)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))
