"""Tensors by their names in memory and in files: what cannot be undone is named, and Transformers 4 converts nothing."""

import json

import pytest
import torch
import transformers

from ds_zoadamu.durability.replay_base import open_base
from ds_zoadamu.errors import ReplayError
from ds_zoadamu.files import hf_names
from ds_zoadamu.files.hf_names import FileNames, meta_model, shapes_of

TINY = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MOE = TINY | {"num_key_value_heads": 1, "num_local_experts": 3}


def _registered(monkeypatch, model_type: str, conversions: list) -> None:
    """Has Transformers convert the files of an architecture by other rules, until the test ends."""
    mapping = pytest.importorskip("transformers.conversion_mapping")
    mapping.get_checkpoint_conversion_mapping(model_type)  # fills the table
    monkeypatch.setitem(mapping._checkpoint_conversion_mapping_cache, model_type, conversions)


def test_a_conversion_that_cannot_be_undone_is_named(monkeypatch):
    from transformers import core_model_loading as loading

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    _registered(monkeypatch, "llama", [loading.WeightRenaming(".k_proj.", ".v_proj.")])
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.v_proj.weight' .*both be saved as .*k_proj.weight'"):
        FileNames(model, shapes_of(model)).to_files()

    class Doubled(loading.Concatenate):
        @property
        def reverse_op(self):
            return loading.Transpose()

    _registered(monkeypatch, "llama", [loading.WeightConverter(".up.weight", ".up_proj.weight", operations=[Doubled()])])
    with pytest.raises(ValueError, match=r"up_proj.weight' of shape \(24, 16\) would be read back as \(16, 24\)"):
        FileNames(model, shapes_of(model)).to_files()


def test_a_base_of_such_files_is_refused_when_it_is_opened(monkeypatch, tmp_path):
    from transformers import core_model_loading as loading

    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE))
    model.save_pretrained(tmp_path)
    shapes = shapes_of(model)
    header = {
        "parameters": [{"name": n, "shape": list(s), "dtype": "float32", "group": 0, "sha256": ""} for n, s in shapes.items()],
        "tied": {}, "untrained": [], "model_class": "MixtralForCausalLM", "base": {"files": {}},
    }  # fmt: skip
    open_base(tmp_path, header).close()

    class Alphabetic(loading.MergeModulelist):
        """Splits into parts of other names."""

        @property
        def reverse_op(self):
            return loading.Chunk()

    own = hf_names.conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    experts = [t for t in own if "down_proj" not in str(t.target_patterns)]
    one_way = loading.WeightConverter(".experts.*.w2.weight", ".experts.down_proj", operations=[Alphabetic()])
    _registered(monkeypatch, "mixtral", [*experts, one_way])
    with pytest.raises(ReplayError, match="'model.layers.0.mlp.experts.down_proj'"):
        open_base(tmp_path, header)


def test_transformers_4_converts_nothing(monkeypatch):
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE))
    monkeypatch.setattr(hf_names, "loading", None)
    monkeypatch.setattr(hf_names, "conversion_mapping", None)
    shapes = shapes_of(model)
    names = FileNames(model, shapes)
    read = names.from_files({**shapes, "of.another.model": (3,)})
    assert [group.given for group in read] == [group.made for group in read] == [(name,) for name in shapes]
    assert [group.made for group in names.to_files()] == [(name,) for name in shapes]


def test_models_that_transformers_does_not_know_are_left_as_they_are(tmp_path):
    assert meta_model(tmp_path, None) is None  # no config.json
    (tmp_path / "config.json").write_text('{"model_type": "nothing_like_it", "auto_map": {"AutoConfig": "evil.Config"}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('this code was run')")
    assert meta_model(tmp_path, None) is None
    kernels = {"attn_implementation": "evil/kernels", "_attn_implementation": "evil/kernels"}
    transformers.LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | kernels))
    assert isinstance(meta_model(tmp_path, None), transformers.LlamaForCausalLM)
    assert all(parameter.is_meta for parameter in meta_model(tmp_path, None).parameters())
    for name in ("", "LlamaConfig", "no_such_class"):
        assert meta_model(tmp_path, name) is None
    assert torch.get_default_device() == torch.device("cpu")
