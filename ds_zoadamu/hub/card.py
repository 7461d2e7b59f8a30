"""The model card of a fine-tune: what it is, how it was made and measured, and how its weights are made again."""

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..durability.journal import Contents, parse_journal
from ..durability.published import ADAPTERS, KEY
from ..files.hub import is_hub_name

_TAGS = ("ds_zoadamu", "zeroth-order")
_TRAINING, _USE = "training", "use"
_WRITES_TEXT = ("text-generation", "text2text-generation")
_DATASET = "your-dataset"  # the hub takes no result without one


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a card says of a run, beside what the journal says.

    Attributes:
        journal: the bytes of the journal's file; None: the run has none.
        step: that the weights are of.
        weights_sha256: ``weights_digest`` of them.
        memory: of each rank, ``PeakMemory.report()`` and bytes that are held between steps.
        settings: what the journal does not say, by name.
        base_model: name on the hub of the model that was tuned; a folder's name is none.
        adapters: the weights are PEFT adapters of it.
        evaluated_by: a task of lm-evaluation-harness.
        forward_only: there was no backward pass.
        pipeline: what the hub calls what the model does; None: not known. lm-evaluation-harness has models that write text.
    """

    journal: bytes | None = None
    step: int = 0
    weights_sha256: str | None = None
    memory: Sequence[Mapping[str, int]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    adapters: bool = False
    evaluated_by: str = "hellaswag,winogrande"
    forward_only: bool = True
    pipeline: str | None = "text-generation"


@dataclass(frozen=True)
class Score:
    """A measured figure: of ``metric`` on ``split`` of ``dataset``, the name on the hub or of one's own; before and after."""

    metric: str
    value: float
    before: float | None = None
    dataset: str = _DATASET
    dataset_type: str = _DATASET
    split: str | None = None


def new_card(run: Run, name: str, scores: Sequence[Score] = (), datasets: Sequence[str] = (), repo: str | None = None) -> str:
    """The text of a card, for a model that is called ``name`` and is, or will be, in ``repo`` of the hub."""
    base = f"[{run.base_model}](https://huggingface.co/{run.base_model})" if run.base_model else "a language model"
    what = "Adapters of" if run.adapters else "This is"
    on = ", ".join(dict.fromkeys(score.dataset for score in scores if score.dataset != _DATASET))
    lines = [
        f"# {name}",
        "",
        f"{what} {base}, fine-tuned{f' on {on}' if on else ''}{' by forward passes only' * run.forward_only}.",
    ]
    if scores:
        lines += ["", "## Results", "", "| metric | split | before | after |", "|---|---|---|---|"]
        lines += [f"| {s.metric} | {s.split or ''} | {_figure(s.before)} | {_figure(s.value)} |" for s in scores]
    data = ModelCardData(
        model_name=name,
        library_name="peft" if run.adapters else "transformers",
        base_model=run.base_model,
        pipeline_tag=run.pipeline,
        datasets=list(datasets) or None,
        eval_results=_eval_results(scores, run.pipeline or "other") or None,
        metrics=list(dict.fromkeys(score.metric for score in scores)) or None,
    )
    return with_run(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n", run, repo)


def with_run(text: str, run: Run, repo: str | None = None) -> str:
    """A card, also one that Transformers or TRL has written, with what is known of the run: metadata, and two sections, which
    take the place of those that are there."""
    card = ModelCard(text, ignore_metadata_errors=True)
    tags = card.data.tags or []
    ours = _TAGS if run.forward_only else _TAGS[:1]
    card.data.tags = [*([tags] if isinstance(tags, str) else tags), *(tag for tag in ours if tag not in tags)]
    if run.journal is not None:
        stated = {"journal_sha256": hashlib.sha256(run.journal).hexdigest(), "step": run.step}
        card.data[KEY] = stated | ({"weights_sha256": run.weights_sha256} if run.weights_sha256 else {})
    card.text = _with_section(card.text, _TRAINING, _training(run))
    # Transformers states the optimizer of its arguments, which a zeroth-order run does not have.
    card.text = re.sub(r"^- optimizer: .*\n", "", card.text, flags=re.MULTILINE)
    return with_use(str(card), run, repo)


def with_use(text: str, run: Run, repo: str | None, has_weights: bool = True) -> str:
    """A card whose section on rebuilding and evaluating is of ``repo``, None: of the folder that the card lies in."""
    return _with_section(text, _USE, _use(run, repo, has_weights))


def said_by(text: str) -> dict[str, Any]:
    """What a card says of a run and a journal does not, as arguments of ``Run``."""
    base, task = (
        ModelCard(text, ignore_metadata_errors=True).data.base_model,
        re.search(r"^lm_eval .*--tasks (\S+)", text, re.M),
    )
    return {"base_model": base if isinstance(base, str) else None} | ({"evaluated_by": task[1]} if task else {"pipeline": None})


def is_ours(text: str) -> bool:
    """Whether a card was written by this library, or is the empty form that PEFT leaves: not a user's own."""
    return _mark(_USE) in text or "# Model Card for Model ID" in text


def hub_name(name: str | None) -> str | None:
    """A model's name where it is one on the hub, or None."""
    return name if name and not os.path.isdir(name) and is_hub_name(name) else None


# --- sections -----------------------------------------------------------------------------------------------------------------


def _mark(section: str) -> str:
    return f"<!-- ds_zoadamu: {section} -->"


def _with_section(text: str, section: str, body: str) -> str:
    mark = _mark(section)
    block = f"{mark}\n{body.rstrip()}\n{mark}"
    if text.count(mark) == 2:
        before, _, rest = text.partition(mark)
        return before + block + rest.partition(mark)[2]
    return text.rstrip() + f"\n\n{block}\n"


def _training(run: Run) -> str:
    rows = dict(run.settings)
    if run.journal is not None:
        rows = _from_journal(parse_journal(run.journal, "the run's journal"), run.step) | rows
    rows["ds_zoadamu"] = _version()
    lines = ["## Zeroth-order training" if run.forward_only else "## Training", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    if run.memory:
        lines += ["", f"Peak memory, measured: {_memory(run.memory)}."]
    return "\n".join(lines)


def _from_journal(contents: Contents, step: int) -> dict[str, Any]:
    header, records = contents.header, contents.records[:step]
    options = header["options"]
    lrs = [lr for record in records for lr in record.lrs]
    batch, number = header["micro_batch_size"], header["micro_batches_a_step"]
    return {
        "rule": header["optimizer"],
        "learning rate": f"{max(lrs):g}" + (f" to {min(lrs):g}" if min(lrs) < max(lrs) else "") if lrs else options.get("lr"),
        "zo_eps": options.get("zo_eps"),
        "weight decay": options.get("weight_decay"),
        "perturbations a step": options.get("num_perturbations"),
        "momentum": (options.get("momentum") or {}).get("dtype"),
        "steps": f"{step} of {len(contents.records)}" if step < len(contents.records) else step,
        "skipped steps": sum(record.skipped for record in records),
        "seed": options.get("seed"),
        "batch": f"{batch * number} ({number} micro-batches of {batch})",
        "trained parameters": f"{sum(math.prod(p['shape']) for p in header['parameters']):,}",
        "their dtype": ", ".join(sorted({p["dtype"] for p in header["parameters"]})),
    }


def _use(run: Run, repo: str | None, has_weights: bool) -> str:
    lines = []
    if run.journal is not None:
        lines += [*_rebuilding(run, repo), ""]
    if run.pipeline not in _WRITES_TEXT:
        return "\n".join(lines)
    place = repo or "."
    if not has_weights:
        place = "rebuilt"
    weights = f"pretrained={place}"
    if run.adapters:
        weights = f"pretrained={run.base_model or 'BASE'},peft={place}"
    command = f"lm_eval --model hf --model_args {weights} --tasks {run.evaluated_by} --batch_size 8"
    note = "With [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness), whose prompts are its own:"
    return "\n".join([*lines, "## Evaluate", "", note, "", "```bash", command, "```"])


def _rebuilding(run: Run, repo: str | None) -> list[str]:
    header = parse_journal(run.journal, "the run's journal", until=0).header
    base, sha256 = header["base"], hashlib.sha256(run.journal).hexdigest()
    lines = ["## Rebuild the weights", "", f"`journal.jsonl`, SHA-256 `{sha256}`, has a line for each step."]
    if base["sha256"] is None:
        return [*lines, "", "The run did not begin with the weights of safetensors files, so that it is not rebuilt from it."]
    local = base["name"] != ADAPTERS and base["revision"] is None and "/" not in base["name"]
    given = " --base FOLDER" if local else ""
    where = f"--from {repo} --output rebuilt" if repo else "--from . --output ../rebuilt"
    lines += ["From it and the base the weights are made again, bit for bit:", "", "```bash"]
    lines += [f"ds_zoadamu replay {where}{given}", "```"]
    if local:
        lines += ["", f"The base is a folder that its author calls `{base['name']}`: name a copy in the place of FOLDER."]
    if run.weights_sha256:
        lines += ["", f"SHA-256 of the trained weights: `{run.weights_sha256}` (step {run.step})."]
    return lines


# --- figures ------------------------------------------------------------------------------------------------------------------


def _eval_results(scores: Sequence[Score], pipeline: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=pipeline,
            dataset_type=score.dataset_type,
            dataset_name=score.dataset,
            dataset_split=score.split,
            metric_type=score.metric,
            metric_value=score.value,
        )
        for score in scores
        if math.isfinite(score.value)
    ]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _memory(ranks: Sequence[Mapping[str, int]]) -> str:
    def most(name: str) -> str:
        return f"{max(rank.get(name, 0) for rank in ranks) / 1e6:,.1f} MB"

    parts = [f"{most('resident_peak')} resident, {most('resident_growth')} of it since the run began"]
    if "accelerator_peak" in ranks[0]:
        parts.insert(0, f"{most('accelerator_peak')} on the accelerator")
    many = f", the most of {len(ranks)} ranks" if len(ranks) > 1 else ""
    return "; ".join(parts) + many


def _version() -> str:
    try:
        return metadata.version("ds_zoadamu")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unreleased"
