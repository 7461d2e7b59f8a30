"""Which kind of language model a configuration is of."""

import pytest
import transformers

from ds_zoadamu.errors import ConfigError
from ds_zoadamu.hf.kinds import CAUSAL, MASKED, SEQ2SEQ, language_part, max_positions, model_kind, pipeline_of
from tests.helpers.tiny_architectures import CAUSAL as CAUSAL_NAMES
from tests.helpers.tiny_architectures import NAMES

KINDS = {"t5": SEQ2SEQ, "bart": SEQ2SEQ, "bert": MASKED, "roberta": MASKED}
SMALL = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}


def test_every_architecture_of_the_tests_is_of_its_kind():
    found = {name: model_kind(transformers.AutoConfig.for_model(name)) for name in NAMES}
    assert found == dict.fromkeys(CAUSAL_NAMES, CAUSAL) | KINDS


@pytest.mark.parametrize(
    "name, changes, kind",
    [
        ("bert", {"is_decoder": True}, CAUSAL),
        ("bert", {"architectures": ["BertForPreTraining"]}, MASKED),
        ("roberta", {"is_decoder": True, "architectures": ["RobertaForCausalLM"]}, CAUSAL),
        ("bart", {"is_encoder_decoder": False, "is_decoder": True, "architectures": ["BartForCausalLM"]}, CAUSAL),
        ("xlm", {"causal": True}, CAUSAL),
        *((name, {}, MASKED) for name in ("xlm", "deberta", "deberta-v2", "distilbert", "albert", "modernbert", "electra")),
        *((name, {}, SEQ2SEQ) for name in ("mt5", "umt5", "t5gemma", "pegasus", "mbart")),
    ],
)
def test_what_could_be_several_is_decided_by_its_flags(name, changes, kind):
    assert model_kind(transformers.AutoConfig.for_model(name, **changes)) is kind


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("vit", {}, r"the model 'vit' \(ViTConfig\) is no language model: .* no causal, masked or sequence-to-sequence"),
        ("whisper", {}, r"the model 'whisper' \(WhisperConfig\) is no language model"),
        ("roberta", {"architectures": ["RobertaForSequenceClassification"]}, "'roberta' is a RobertaForSequenceClassification"),
        (
            "t5",
            {"architectures": ["T5ForTokenClassification"]},
            "is a T5ForTokenClassification: .* no head over the vocabulary",
        ),
        ("opt", {"architectures": ["OPTForQuestionAnswering"]}, "is a OPTForQuestionAnswering"),
    ],
)
def test_a_model_of_no_kind_is_refused_by_name(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        model_kind(transformers.AutoConfig.for_model(name, **changes))


@pytest.mark.parametrize(
    "name, pipeline",
    [("MaskedLM", "fill-mask"), ("SequenceClassification", None), ("CausalLM", "text-generation")],
)
def test_a_card_says_what_the_model_is_not_what_its_configuration_could_be(name, pipeline):
    config = transformers.RobertaConfig(**SMALL, is_decoder=name == "CausalLM")
    assert pipeline_of(getattr(transformers, f"RobertaFor{name}")(config)) == pipeline


def test_a_command_refuses_it_before_weights_are_looked_for(tmp_path):
    from ds_zoadamu.training.arguments import evaluate_parser
    from ds_zoadamu.training.plan import read_model_input

    transformers.RobertaConfig(architectures=["RobertaForSequenceClassification"]).save_pretrained(tmp_path)
    args = evaluate_parser().parse_args(["--model_name_or_path", str(tmp_path)])
    with pytest.raises(ConfigError, match=f"the model '{tmp_path}' is a RobertaForSequenceClassification"):
        read_model_input(args)


def test_models_with_code_of_their_own_say_what_they_are():
    class Mine(transformers.PretrainedConfig):
        model_type = "mine"

    for kind in (CAUSAL, MASKED):
        assert model_kind(Mine(auto_map={kind.auto.__name__: "code.Mine"})) is kind
    with pytest.raises(ConfigError, match="'mine'"):
        model_kind(Mine())


def test_the_language_models_part_has_the_sizes():
    gemma = transformers.AutoConfig.for_model("gemma3")
    assert language_part(gemma) == (CAUSAL, gemma.text_config)
    t5 = transformers.T5Config()
    assert language_part(t5) == (SEQ2SEQ, t5) and language_part(None) == (CAUSAL, None)


@pytest.mark.parametrize(
    "config, expected",
    [
        (transformers.RobertaConfig(max_position_embeddings=20, pad_token_id=1, **SMALL), 18),
        (transformers.RobertaConfig(max_position_embeddings=20, pad_token_id=3, **SMALL), 16),
        (transformers.BertConfig(max_position_embeddings=20, pad_token_id=3, **SMALL), 20),
        (transformers.DebertaV2Config(max_position_embeddings=20, **SMALL), 20),
    ],
)
def test_positions_are_those_that_a_text_may_have(config, expected):
    import torch

    assert max_positions(config) == expected
    model, ids = MASKED.auto.from_config(config).eval(), torch.full((1, expected), 5)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if "Roberta" in type(config).__name__:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, expected + 1), 5))
