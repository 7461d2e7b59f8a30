"""Tiny configurations of the architectures that Transformers has, for tests; each with random weights."""

import torch
import transformers

VOCAB = 67
_COMMON = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = _MLA | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_BERT = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}

CAUSAL = {
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
            "word_embed_proj_dim": 16},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "max_position_embeddings": 32, "window_size": 4},
    "gpt_neox": _BERT,
    "gptj": _GPT | {"rotary_dim": 4},
    "codegen": _GPT | {"rotary_dim": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "new_decoder_architecture": False},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA | {"num_local_experts": 4},
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3": _LLAMA | {"head_dim": 8},
    "qwen3_moe": _LLAMA | _EXPERTS | {"head_dim": 8},
    "qwen3_next": _LLAMA | _EXPERTS | {
        "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "phimoe": _LLAMA | {"num_local_experts": 4},
    "gemma": _LLAMA | {"head_dim": 8},
    "gemma2": _LLAMA | {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": _LLAMA | {"head_dim": 8, "sliding_window": 4},
    "granite": _LLAMA,
    "granitemoe": _LLAMA | {"num_local_experts": 4},
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmoe": _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _LLAMA | _DEEPSEEK,
    "deepseek_v3": _LLAMA | _DEEPSEEK,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "cohere": _LLAMA,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "jamba": _LLAMA | {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4,
        "use_mamba_kernels": False},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "rescale_every": 0},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 32},
}  # fmt: skip
OTHERS = {
    "t5": (transformers.T5ForConditionalGeneration, {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}),
    "bart": (transformers.BartForConditionalGeneration, {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32, "decoder_start_token_id": 2,
        "forced_eos_token_id": 2}),
    "bert": (transformers.BertForMaskedLM, _BERT),
    "roberta": (transformers.RobertaForMaskedLM, _BERT | {"max_position_embeddings": 40}),
}  # fmt: skip
NAMES = [*CAUSAL, *OTHERS]


def tiny(name: str) -> transformers.PreTrainedModel:
    """The model of that name with random weights that are the same every time, in eval mode."""
    options = _COMMON | (CAUSAL[name] if name in CAUSAL else OTHERS[name][1])
    config = transformers.AutoConfig.for_model(name, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class = transformers.AutoModelForCausalLM if name in CAUSAL else OTHERS[name][0]
        make = model_class.from_config if name in CAUSAL else model_class
        return make(config).eval()
