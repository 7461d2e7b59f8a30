"""What a finished run is shown with: the card and the journal beside its model, and both on the hub."""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from ds_zoadamu.distributed.collective import on_all_ranks
from ds_zoadamu.distributed.start import launched_rank
from ds_zoadamu.durability.journal import parse_journal
from ds_zoadamu.durability.published import CARD, adapter_files
from ds_zoadamu.errors import HubError
from ds_zoadamu.files.safetensors_io import write_durably
from ds_zoadamu.hub import card
from ds_zoadamu.hub.upload import create_repo, upload_folder
from ds_zoadamu.tasks import load_task
from ds_zoadamu.training.output import JOURNAL, MODEL
from ds_zoadamu.training.plan import Plan

_NOT_METRICS = ("num_nonfinite",)
_LM_EVAL = ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "drop")
"""Tasks that lm-evaluation-harness calls by the same names."""


def prepare_repo(args: Namespace) -> str | None:
    """The repository of --push_to_hub, made before the run: without a token or a network there is none. None: nothing is sent.

    All ranks call it; only the first one's answer has the whole name. Raises HubError.
    """
    if not args.push_to_hub:
        return None
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    with on_all_ranks(HubError):
        return create_repo(name, args.hub_private_repo or None) if launched_rank() == 0 else name


def write_card(plan: Plan, results: dict[str, Any], folder: Path, repo: str | None) -> None:
    """The card, and copies of the journal and of the adapters before training, in a run's model folder; on the first rank.

    Raises OSError.
    """
    args, journal = plan.args, folder / JOURNAL
    data = journal.read_bytes() if journal.exists() else None
    run = card.Run(
        journal=data,
        step=results["best_step"],
        weights_sha256=results["weights_sha256"],
        memory=results["ranks"],
        settings=_settings(results, data is not None),
        base_model=card.hub_name(args.model_name_or_path),
        adapters=plan.tuning.adapter is not None,
        pipeline=plan.kind.pipeline,
        forward_only=not results["passes_a_step"]["backward"],
        **({"evaluated_by": results["task"]} if results["task"] in _LM_EVAL else {}),
    )
    hub_path = None if args.data_dir else getattr(load_task(args.task), "hub_path", None)
    text = card.new_card(
        run,
        name=(repo or folder.absolute().name).split("/")[-1],
        scores=_scores(plan, results, hub_path),
        datasets=[hub_path] if hub_path else [],
        repo=repo,
    )
    model = folder / MODEL
    if data is not None:
        write_durably(model / JOURNAL, data)
        for name in adapter_files(parse_journal(data, str(journal), until=0).header):  # without them it rebuilds nothing
            (model / name).parent.mkdir(exist_ok=True)
            write_durably(model / name, (folder / name).read_bytes())
    write_durably(model / CARD, text.encode())


def push(folder: Path, repo: str, results: dict[str, Any]) -> None:
    """Send a run's model folder. All ranks call it; raises HubError on all, after which everything is on the disk."""
    with on_all_ranks(HubError):
        if launched_rank() == 0:
            upload_folder(folder / MODEL, repo, f"Model after step {results['best_step']}")
            print(f"sent to https://huggingface.co/{repo}", flush=True)


def _settings(results: dict[str, Any], has_journal: bool) -> dict[str, Any]:
    said = {"task": results["task"], "objective": results.get("objective")}
    said |= {"ranks": results["world_size"], "seconds a step": f"{results['seconds_a_step']['median']:.3f}"}
    if has_journal:
        return said
    arguments, config = results["arguments"], results["config"]
    return said | {
        "optimizer": results["optimizer"],
        "learning rate": config.get("optimizer", {}).get("params", {}).get("lr", arguments["learning_rate"]),
        "steps": f"{results['best_step']} of {results['max_steps']}",
        "seed": arguments["seed"],
        "batch": config.get("train_batch_size", arguments["per_device_train_batch_size"]),
    }


def _scores(plan: Plan, results: dict[str, Any], hub_path: str | None) -> list[card.Score]:
    kinds = [name for name, values in results.items() if isinstance(values, dict) and "test_after" in values]
    return [
        card.Score(
            metric=name,
            value=results[name]["test_after"],
            before=results[name]["test_before"],
            dataset=plan.task.name,
            dataset_type=hub_path or plan.task.name,
            split="validation",
        )
        for name in kinds
        if name not in _NOT_METRICS and math.isfinite(results[name]["test_after"])
    ]
