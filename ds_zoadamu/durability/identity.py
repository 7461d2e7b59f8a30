"""What makes a run this run: every setting its updates and its data order depend on, independent of ranks and partitions.

The header of a journal and the manifest of a checkpoint both carry it; a resume and a load compare it with the engine's own.
"""

from typing import Any

from ..distributed import collective
from ..errors import printed, shown
from ..files.safetensors_io import dtype_name
from ..rules import origin
from ..zero3.partition import canonical_name
from .digest import frozen_digest, frozen_digests

# They bound or end a run, or are defaults of others, but no update depends on them: a resume may change them.
FREE_OPTIONS = ("total_steps", "max_skipped_steps", "momentum.max_window")


def run_identity(engine: Any) -> dict:
    """The identity of an engine's run as JSON holds it. The same on all ranks and for any number of ranks.

    The first call on an engine hashes the frozen parameters: call ``digest.frozen_digests`` on all ranks before.
    """
    optimizer = engine.optimizer
    group_of = {id(param): index for index, group in enumerate(optimizer.param_groups) for param in group["params"]}
    parameters = [
        {"name": p.name, "shape": list(p.shape), "dtype": dtype_name(p.dtype), "group": group_of[id(p.param)]}
        for p in optimizer.partitions
    ]
    data = engine.own_data
    return {
        "noise_version": optimizer.rule.noise_version,
        "optimizer": optimizer.rule.name,
        "options": optimizer.rule.config.recorded(),
        "groups": [{"weight_decay": float(group["weight_decay"])} for group in optimizer.param_groups],
        "micro_batch_size": engine.train_micro_batch_size_per_gpu(),
        "micro_batches_a_step": engine.gradient_accumulation_steps() * collective.world_size(),
        "data": None if data is None else data.identity(),
        "parameters": parameters,
        "frozen_sha256": frozen_digest(engine),
    }


def surroundings(engine: Any) -> dict:
    """What a rebuilt model needs beside the trained parameters: {"tied": {name: other names}, "untrained": [[name, dtype],
    ...], "model_class"}, and where a rule that is not the library's own comes from. Frozen parameters have their SHA-256 as a
    third entry."""
    module = engine.module
    names: dict[int, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(canonical_name(name))
    trained = {id(p.param) for p in engine.optimizer.partitions}
    untrained = [
        [canonical_name(n), dtype_name(p.dtype)]
        for n, p in module.named_parameters(remove_duplicate=False)
        if id(p) not in trained
    ]
    digests = frozen_digests(engine)
    untrained = [[*entry, digests[entry[0]]] if entry[0] in digests else entry for entry in untrained]
    persistent = module.state_dict().keys()
    untrained += [[canonical_name(n), dtype_name(b.dtype)] for n, b in module.named_buffers() if n in persistent]
    tied = {names[id(p.param)][0]: names[id(p.param)][1:] for p in engine.optimizer.partitions if len(names[id(p.param)]) > 1}
    own = type(module).__module__.startswith("transformers.")  # remote code converts nothing, whatever its name
    source = origin(type(engine.optimizer.rule))
    found = {"tied": tied, "untrained": untrained, "model_class": type(module).__name__ if own else ""}
    return found | ({} if source is None else {"rule_from": source})


def _flat(identity: dict) -> dict[str, Any]:
    """Everything but the parameters under dotted names."""
    result: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            result[prefix] = value

    walk(
        "",
        {
            key: identity.get(key)
            for key in ("noise_version", "optimizer", "micro_batch_size", "micro_batches_a_step", "groups", "data", "task")
        },
    )
    walk("", identity.get("options", {}))
    return result


BATCH = ("micro_batch_size", "micro_batches_a_step")


def differences(ours: dict, theirs: dict, *, ignore: tuple[str, ...] = ()) -> list[str]:
    """One phrase for each thing that differs between this engine's identity and that of a file; empty where the run is the
    same."""
    mine, other = _flat(ours), _flat(theirs)
    found = [
        printed(key)
        + (" differs" if key.endswith("sha256") else f" is {shown(mine.get(key))} here and {shown(other.get(key))} there")
        + _hint(key)
        for key in sorted(mine.keys() | other.keys())
        if key not in (*FREE_OPTIONS, *ignore) and mine.get(key) != other.get(key)
    ]
    if "frozen_sha256" in theirs and ours.get("frozen_sha256") != theirs["frozen_sha256"]:  # older files do not have it
        found.append(
            f"the frozen parameters have SHA-256 {ours.get('frozen_sha256')} here and {theirs['frozen_sha256']} there (another "
            "base model)"
        )
    by_name = {p["name"]: p for p in theirs.get("parameters", [])}
    for parameter in ours.get("parameters", []):
        match = by_name.pop(parameter["name"], None)
        if match is None:
            found.append(f"parameter {parameter['name']!r} is trained here and not there")
            continue
        found += [
            f"{key} of {parameter['name']!r} is {shown(parameter[key])} here and {shown(match[key])} there"
            for key in ("shape", "dtype", "group")
            if parameter[key] != match[key]
        ]
    found += [f"parameter {shown(name)} is trained there and not here" for name in by_name]
    return found


_TASK_HINTS = {
    "train_sha256": "the encoded training examples: rows, their draw and order, template, label words, tokenizer, length",
    "dev_sha256": "the encoded development examples, which decide what the best step is",
    "test_sha256": "the encoded test examples",
    "score": "where it has none, options are compared by sums: --score sum",
}


def _hint(key: str) -> str:
    section, _, name = key.partition(".")
    if section == "task" and name in _TASK_HINTS:
        return f" ({_TASK_HINTS[name]})"
    if key == "micro_batches_a_step":
        return " (ranks x gradient_accumulation_steps: keep it constant when the number of ranks changes)"
    if key == "momentum.dtype":
        return " (a stored momentum cannot change its mode within a run)"
    return ""


def phrase(found: list[str], limit: int = 4) -> str:
    """The first few differences as one line."""
    more = f"; and {len(found) - limit} more" if len(found) > limit else ""
    return "; ".join(found[:limit]) + more
