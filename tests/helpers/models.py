"""Tiny models with everything that partitions badly: odd sizes, a tied weight, a frozen and a 0-d parameter, one smaller than
the ranks.
"""

import torch
import transformers


class OddModel(torch.nn.Module):
    """A language model of 11 tokens on its own; ``forward(input_ids, labels)`` returns an object with ``.loss``."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        vocab, width = 11, 7
        self.embed = torch.nn.Embedding(vocab, width)
        self.mix = torch.nn.Linear(width, 13)
        self.frozen = torch.nn.Linear(13, 5, bias=False)
        self.out = torch.nn.Linear(5, width)
        self.head = torch.nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight
        self.temperature = torch.nn.Parameter(torch.tensor(1.25))
        self.pair = torch.nn.Parameter(torch.empty(2))
        self.dropout = torch.nn.Dropout(0.5)
        self.frozen.weight.requires_grad_(False)
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() or p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            self.temperature.fill_(1.25)
        self.to(dtype)

    def forward(self, input_ids, labels=None):
        x = self.dropout(self.embed(input_ids))
        x = self.out(torch.tanh(self.frozen(torch.tanh(self.mix(x)))))
        x = x * self.pair[0] + self.pair[1]
        logits = (self.head(x) * self.temperature).float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def odd_batches(num: int, micro_batch: int = 2, length: int = 6, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num):
        ids = torch.randint(0, 11, (micro_batch, length), generator=generator)
        labels = ids.clone()
        labels[0, : int(torch.randint(1, length - 1, (1,), generator=generator))] = -100  # micro-batches weigh differently
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def tiny_opt(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2) -> torch.nn.Module:
    """OPT with 2 layers, tied embeddings and an odd vocabulary; deterministic weights."""
    config = transformers.OPTConfig(
        vocab_size=67, hidden_size=24, ffn_dim=40, num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=32,
        word_embed_proj_dim=24, dropout=0.1, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.to(dtype)
