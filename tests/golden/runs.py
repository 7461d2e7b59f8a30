"""Runs whose every bit is known: a model that computes the same numbers on every processor, trained in all momentum modes.

The digests in ``digests.json`` and the run in ``recorded/`` were written by an earlier release:

    python -m tests.golden.record        writes both anew; only where a new journal or noise format is wanted
"""

import hashlib
import json
from pathlib import Path

import torch

HERE = Path(__file__).parent
DIGESTS, RECORDED = HERE / "digests.json", HERE / "recorded"
STEPS, RECORDED_STEP = 60, 30

RULES = {
    "zoadamu-int8": {"type": "ZOAdaMU", "params": {"momentum": {"dtype": "int8"}}},
    "zoadamu-replay": {"type": "ZOAdaMU", "params": {"momentum": {"dtype": "replay", "max_window": 200}}},
    "mezo-q2": {"type": "MeZO", "params": {"num_perturbations": 2}},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [f"{rule}-{dtype}" for rule in RULES for dtype in DTYPES]


class ExactModel(torch.nn.Module):
    """A loss that does not depend on the order of a sum: fp64 arithmetic element by element, and integers added up.

    ``large``: with a parameter that the kernels take in several chunks.
    """

    def __init__(self, dtype: torch.dtype, large: bool):
        super().__init__()
        shapes = {"matrix": (13, 7), "vector": (9,), "one": (1,)} | ({"large": (331, 211)} if large else {})
        self.names = list(shapes)
        for name, shape in shapes.items():
            numel = torch.Size(shape).numel()
            values = (torch.arange(numel) * 7 % 31 - 15).reshape(shape) / 64  # exact in bf16
            self.register_parameter(name, torch.nn.Parameter(values.to(dtype)))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """numbers: [B] int64, a target each; returns the mean over targets and parameters as an fp64 scalar."""
        total = 0
        for name in self.names:
            flat = getattr(self, name).double().reshape(-1)
            for number in numbers.tolist():
                target = ((torch.arange(flat.numel()) * 5 + number) % 17 - 8).double() / 32
                difference = flat - target
                total += int((difference * difference * 2.0**40 / flat.numel()).round().long().sum())
        return torch.tensor(total / 2.0**40 / len(numbers) / len(self.names), dtype=torch.float64)


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def exact_loss(module, numbers):
    return module(numbers), len(numbers)


def engine_of(case: str, world_size: int, large: bool = True):
    """(engine, endless iterator) of a case on one rank with two micro-batches a step, or on two."""
    import ds_zoadamu
    from ds_zoadamu.zero3.data import repeat

    rule, _, dtype = case.rpartition("-")
    params = {"lr": 3e-2, "zo_eps": 1e-2, "seed": 11, "weight_decay": 0.1}
    if RULES[rule]["type"] == "ZOAdaMU":
        params |= {"lr": 3e-3, "total_steps": STEPS, "t1": 8, "t2": 40, "t3": 60}
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2 // world_size,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
        "optimizer": {"type": RULES[rule]["type"], "params": params | RULES[rule]["params"]},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    engine, _, loader, _ = ds_zoadamu.initialize(
        model=ExactModel(DTYPES[dtype], large), config=config, training_data=Numbers(), loss_fn=exact_loss
    )
    return engine, repeat(loader)


def record_bodies_sha256(journal: Path) -> str:
    """Over the records without their checksums, which hang on the header."""
    lines = journal.read_bytes().splitlines()[1:]
    return hashlib.sha256(b"\n".join(line.rpartition(b",")[0] for line in lines)).hexdigest()


def run_cases(rank: int, world_size: int, folder: str, cases: list[str]) -> dict[str, dict]:
    """What each case's run comes to: {"weights", "records", "journal"}, SHA-256 in hex."""
    from ds_zoadamu import weights_digest

    results = {}
    for case in cases:
        engine, batches = engine_of(case, world_size)
        journal = Path(folder) / f"{case}-{world_size}.jsonl"
        engine.open_journal(journal, fsync_every=STEPS)
        for _ in range(STEPS):
            engine.train_batch(batches)
        weights = weights_digest(engine)
        engine.destroy()
        sha256 = hashlib.sha256(journal.read_bytes()).hexdigest()
        results[case] = {"weights": weights, "records": record_bodies_sha256(journal), "journal": sha256}
    return results


def digests() -> dict[str, dict]:
    return json.loads(DIGESTS.read_text())
