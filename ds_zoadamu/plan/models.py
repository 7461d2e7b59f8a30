"""The configuration of a language model: OPT's built in, others from a folder or the hub."""

from pathlib import Path

from ..errors import ConfigError
from ..files.hub import is_hub_name, not_here, out_of_reach
from ..files.json_files import read_json

# name -> (hidden size, layers, attention heads). Source: Zhang et al. 2022 (arXiv 2205.01068), Table 1, and the config.json
# files of facebook/opt-*.
OPT_SHAPES = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "66b": (9216, 64, 72),
    "175b": (12288, 96, 96),
}
_PREFIX = "facebook/opt-"
# Without these Transformers fills in the class's default and describes another model. Only the first four are in every family.
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_REQUIRED_OF = {
    "opt": ("ffn_dim", "max_position_embeddings"),
    "llama": ("intermediate_size",),
    "mistral": ("intermediate_size",),
}


def opt_config(size: str):
    """The OPTConfig of one of ``OPT_SHAPES``: ffn 4 x hidden, 2048 positions (the table holds 2 more), tied embeddings."""
    from transformers import OPTConfig

    hidden, layers, heads = OPT_SHAPES[size]
    small = size == "350m"  # the one member with a narrower embedding and the layer norm behind each block
    return OPTConfig(
        vocab_size=50272,
        hidden_size=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        word_embed_proj_dim=512 if small else hidden,
        do_layer_norm_before=not small,
    )


def load_config(name: str):
    """The Transformers configuration of ``name``: a built-in OPT ("facebook/opt-30b" or "opt-30b"), a folder, or a name on the
    hub.

    Raises ConfigError for a model that nobody knows, a config.json that cannot be read, or one that lacks a size.
    """
    size = str(name).lower().removeprefix("facebook/").removeprefix("opt-")
    if size in OPT_SHAPES and str(name).lower() in (_PREFIX + size, "opt-" + size):
        return opt_config(size)
    path = Path(name)
    if path.is_dir():
        return _from_json(path / "config.json")
    from transformers import AutoConfig

    if not is_hub_name(str(name)):
        raise ConfigError(f"--model {name}: {not_here(str(name))}")
    offline = out_of_reach()
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=offline is not None)
    except (OSError, ValueError) as error:
        _refuse_own_code(name, error)
        raise ConfigError(
            f"--model {name}: not built in ({', '.join(_PREFIX + s for s in OPT_SHAPES)}), not a folder, and not to be had "
            f"from the hub ({offline or str(error).splitlines()[0]}); give one of these names or a folder with a config.json"
        ) from error


def _refuse_own_code(name: str | Path, error: Exception) -> None:
    if "trust_remote_code" in str(error):
        raise ConfigError(
            f"--model {name}: its architecture is Python code of its own, which the plan does not run; plan with the "
            "config.json of a model of the same sizes that Transformers knows"
        ) from error


def _from_json(path: Path):
    from transformers import AutoConfig

    given = read_json(path, f"--model: {path}")
    if not isinstance(given, dict) or "model_type" not in given:
        raise ConfigError(f'--model: {path} has no "model_type", so its architecture is unknown; add it, for example "opt"')
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        _refuse_own_code(path.parent, error)
        raise ConfigError(
            f"--model: {path} is not a configuration that Transformers reads: {str(error).splitlines()[0]}"
        ) from error
    text = config.get_text_config()
    inner = next(
        (v for k, v in given.items() if isinstance(v, dict) and text is not config and v.get("model_type") == text.model_type),
        given,
    )
    for field in _REQUIRED + _REQUIRED_OF.get(text.model_type, ()):
        alias = text.attribute_map.get(field, field)
        if field not in inner and alias not in inner and hasattr(text, alias):
            raise ConfigError(
                f'--model: {path} lacks "{alias}"; Transformers would assume {getattr(text, alias)!r}, '
                "a different model: add it"
            )
    return config
