"""Which kind of language model a Transformers configuration describes, and with which class it is loaded."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from ds_zoadamu.errors import ConfigError, shown


@dataclass(frozen=True)
class ModelKind:
    """A way for a language model to answer.

    Attributes:
        name: what messages call it.
        auto: Transformers' class that loads such a model.
        mapping: from configurations to the models of this kind, as Transformers keeps it.
        pipeline: what the hub calls what such a model does.
    """

    name: str
    auto: type
    mapping: Any
    pipeline: str

    def knows(self, config) -> bool:
        """Whether there is a model of this kind for a configuration, in Transformers or in the files beside it."""
        return type(config) in self.mapping or self.auto.__name__ in (getattr(config, "auto_map", None) or {})


CAUSAL = ModelKind("causal", transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING, "text-generation")
MASKED = ModelKind("masked", transformers.AutoModelForMaskedLM, transformers.MODEL_FOR_MASKED_LM_MAPPING, "fill-mask")
SEQ2SEQ = ModelKind(
    "sequence-to-sequence",
    transformers.AutoModelForSeq2SeqLM,
    transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "text2text-generation",
)
_OTHER_HEADS = (
    transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    transformers.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    transformers.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING,
)


def model_kind(config) -> ModelKind:
    """The kind of a model.

    Some configurations are of several kinds to Transformers, and their flags decide: with an encoder and a decoder the model is
    a sequence-to-sequence one (BART), one that could be masked or causal (BERT, RoBERTa) is masked unless it calls itself a
    decoder.

    Args:
        config: a Transformers configuration.

    Raises:
        ConfigError: a model of no kind, or one whose weights have the head of another task.
    """
    name = getattr(config, "name_or_path", "") or config.model_type
    if head := _other_head(config):
        raise ConfigError(
            f"the model {shown(name)} is a {head}: its weights have no head over the vocabulary; give the language model that "
            "it was made of"
        )
    if getattr(config, "is_encoder_decoder", False):
        possible = (SEQ2SEQ,)
    elif getattr(config, "is_decoder", False) or getattr(config, "causal", False):  # XLM's word for it
        possible = (CAUSAL,)
    else:
        possible = (MASKED, CAUSAL)
    for kind in possible:
        if kind.knows(config):
            return kind
    raise ConfigError(
        f"the model {shown(name)} ({type(config).__name__}) is no language model: Transformers knows no causal, masked or "
        "sequence-to-sequence one of that configuration"
    )


def pipeline_of(model: Any) -> str | None:
    """What the hub calls what a model does, by its class, since what its configuration could be is not what it is (a classifier
    made of RoBERTa's); None of one that is no language model."""
    config = getattr(model, "config", None)
    if getattr(model, "can_generate", bool)():
        return (SEQ2SEQ if getattr(config, "is_encoder_decoder", False) else CAUSAL).pipeline
    return MASKED.pipeline if type(config) in MASKED.mapping and isinstance(model, MASKED.mapping[type(config)]) else None


def language_part(config) -> tuple[ModelKind, Any]:
    """The kind of a model, and the part of its configuration that has the language model's sizes: models with several parts
    keep them in a section of their own. Nothing is taken for a causal model. Raises ConfigError, as `model_kind`."""
    if config is None:
        return CAUSAL, None
    kind = model_kind(config)
    return kind, config.get_text_config() if kind is CAUSAL else config


def max_positions(config) -> int | None:
    """The longest text that a masked model has positions for; None: it counts none.

    RoBERTa and its relatives number positions from behind the padding token's, whose row the table has too.
    """
    size = getattr(config, "max_position_embeddings", None)
    if size is None or type(config) not in MASKED.mapping:
        return size
    with torch.device("meta"):
        model = MASKED.auto.from_config(config)
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings") and hasattr(m, "padding_idx")]
    return min([size, *(size - m.padding_idx - 1 for m in tables if m.padding_idx is not None)])


def _other_head(config) -> str | None:
    """The class that a configuration says its weights are of, where that is one of another task."""
    heads = {_name(mapping[type(config)]) for mapping in _OTHER_HEADS if type(config) in mapping}
    return next((name for name in getattr(config, "architectures", None) or () if name in heads), None)


def _name(model_class) -> str:
    return getattr(model_class, "__name__", "")
