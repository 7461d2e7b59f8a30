"""The default loss is the model's own, and the mean over micro-batches that of all their labels, whatever the head."""

import pytest
import torch
import transformers as t

from ds_zoadamu.zero3.losses import model_loss

_SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_BERT = {**_SMALL, "num_labels": 3, "max_position_embeddings": 16}


def _t5():
    return t.T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, num_labels=3,
                      decoder_start_token_id=0)  # fmt: skip


HEADS = {
    "llama": (t.LlamaForCausalLM, lambda: t.LlamaConfig(**_SMALL), "shifted"),
    "bart-decoder": (t.BartForCausalLM, lambda: t.BartConfig(
        vocab_size=31, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, max_position_embeddings=16,
        is_decoder=True, is_encoder_decoder=False), "tokens"),
    "t5": (t.T5ForConditionalGeneration, _t5, "tokens"),
    "bert-masked": (t.BertForMaskedLM, lambda: t.BertConfig(**_BERT), "tokens"),
    "bert-tokens": (t.BertForTokenClassification, lambda: t.BertConfig(**_BERT), "tokens"),
    "bert-rows": (t.BertForSequenceClassification, lambda: t.BertConfig(**_BERT), "rows"),
    "llama-rows": (t.LlamaForSequenceClassification, lambda: t.LlamaConfig(**_SMALL, num_labels=3, pad_token_id=0), "rows"),
    "bert-regression": (t.BertForSequenceClassification, lambda: t.BertConfig(**_BERT | {"num_labels": 1}), "squares"),
    "bert-multi": (t.BertForSequenceClassification,
                   lambda: t.BertConfig(**_BERT, problem_type="multi_label_classification"), "binary"),
}  # fmt: skip


def _micro_batches(kind: str, generator: torch.Generator) -> list[dict]:
    """Two micro-batches that weigh differently."""
    batches = []
    for rows, length, ignored in ((3, 7, 5), (2, 4, 1)):
        ids = torch.randint(3, 31, (rows, length), generator=generator)
        if kind in ("shifted", "tokens"):
            labels = torch.randint(0, 3, (rows, length), generator=generator)
            labels[0, :ignored] = -100
        elif kind == "rows":
            labels = torch.tensor([2, -100, 1][:rows])
        elif kind == "squares":
            labels = torch.randn(rows, generator=generator) - 100.0
        else:
            labels = (torch.rand(rows, 3, generator=generator) > 0.5).float()
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def _all_losses(kind: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of every label that counts, worked out from the logits."""
    if kind == "squares":
        return (logits.squeeze(-1) - labels) ** 2
    if kind == "binary":
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    if kind == "shifted":
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != -100
    return -logits.log_softmax(-1)[counted].gather(-1, labels[counted][:, None])


@pytest.mark.parametrize("head", HEADS)
def test_the_mean_over_micro_batches_is_that_of_all_labels(head):
    model_class, config, kind = HEADS[head]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config()).eval()
    batches = _micro_batches(kind, torch.Generator().manual_seed(1))
    with torch.no_grad():
        pairs = [model_loss(model, batch) for batch in batches]
        losses = torch.cat([_all_losses(kind, model(**batch).logits, batch["labels"]).flatten() for batch in batches])
    mean = sum(float(loss) * float(weight) for loss, weight in pairs) / sum(float(weight) for _, weight in pairs)
    assert mean == pytest.approx(losses.double().mean().item(), rel=1e-6)  # fp32 sums in another order


def test_one_token_answers_weigh_something():
    model = t.T5ForConditionalGeneration(_t5()).eval()
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([[5], [6]])}
    assert float(model_loss(model, batch)[1]) == 2


def test_virtual_tokens_make_the_first_label_count():
    """PEFT's prompt tuning puts tokens before the first, which then predict it."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        t.LlamaForCausalLM(t.LlamaConfig(**_SMALL)), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    ids = torch.randint(3, 31, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, weight = model_loss(model, {"input_ids": ids, "labels": ids})
        logits = model(input_ids=ids).logits[:, 2:-1]
    assert weight == ids.numel()
    assert float(loss) == pytest.approx(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).item(), rel=1e-6)


def test_image_tokens_of_git_do_not_make_the_first_label_count():
    """Its logits are longer than the labels too, and it cuts off those of the image before it shifts."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = t.GitConfig(vision_config=vision | {"image_size": 8, "patch_size": 4}, **_SMALL, max_position_embeddings=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.GitForCausalLM(config).eval()
    ids = torch.randint(3, 31, (2, 6), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss, weight = model_loss(model, {"input_ids": ids, "pixel_values": pixels, "labels": ids})
        logits = model(input_ids=ids, pixel_values=pixels).logits
    assert logits.shape[1] == 6 + 5 and weight == 2 * 5
    expected = torch.nn.functional.cross_entropy(logits[:, 5:-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)


def test_masked_places_of_an_audio_model_do_not_count():
    class Qwen2AudioForConditionalGeneration(torch.nn.Module):
        """As the real one takes its mean."""

        def forward(self, labels, attention_mask):
            logits = torch.zeros(*labels.shape, 5)
            kept = attention_mask[:, 1:] != 0
            loss = torch.nn.functional.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept])
            return t.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    batch = {
        "labels": torch.tensor([[1, 2, 3, 0], [1, -100, 3, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    }
    assert model_loss(Qwen2AudioForConditionalGeneration(), batch)[1] == 4


class _Odd(torch.nn.Module):
    def __init__(self, output: object):
        super().__init__()
        self.output = output

    def forward(self, labels):
        return self.output


@pytest.mark.parametrize(
    "output, message",
    [
        (t.modeling_outputs.QuestionAnsweringModelOutput(loss=torch.tensor(1.0)), "a QuestionAnsweringModelOutput, of"),
        (torch.tensor(1.0), "returned a Tensor, of"),
        (t.modeling_outputs.CausalLMOutput(logits=torch.zeros(1, 2, 3)), "no loss of the batch's labels"),
        (t.modeling_outputs.CausalLMOutput(logits=torch.zeros(1, 4, 3)), "_Odd returned 4 logits a row for 2 labels, of"),
    ],
)
def test_other_outputs_need_a_loss_fn(output, message):
    with pytest.raises(TypeError, match=message + ".*pass loss_fn= to ds_zoadamu.initialize"):
        model_loss(_Odd(output), {"labels": torch.zeros(1, 2, dtype=torch.long)})


def test_adapters_that_weigh_labels_by_themselves_need_a_loss_fn():
    peft = pytest.importorskip("peft")
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2],
        opt_weighted_loss_type="decay", opt_loss_decay_factor=0.9,
    )  # fmt: skip
    model = peft.get_peft_model(t.LlamaForCausalLM(t.LlamaConfig(**_SMALL)), config).eval()
    ids = torch.randint(3, 31, (2, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match="CPT, which weighs labels by itself, of which .* pass loss_fn="):
        model_loss(model, {"input_ids": ids, "labels": ids})


def test_ctc_is_no_causal_head():
    ctc = type("SomeForCTC", (_Odd,), {})(t.modeling_outputs.CausalLMOutput(loss=torch.tensor(1.0)))
    with pytest.raises(TypeError, match="SomeForCTC returned a CausalLMOutput, of"):
        model_loss(ctc, {"labels": torch.zeros(1, 2, dtype=torch.long)})
