"""Levels of a processor's instructions that the suite can be held to, for what only another processor would show."""

LEVELS = {
    level: {
        "ATEN_CPU_CAPABILITY": aten,  # torch's own kernels
        "ONEDNN_MAX_CPU_ISA": onednn,  # its products and convolutions, and what DeepSpeed asks whether there is fp16
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "DS_ZOADAMU_SIMD": level,
    }
    for level, aten, onednn, mkl in (
        ("sse2", "default", "SSE41", "SSE4_2"),
        ("avx2", "avx2", "AVX2", "AVX2"),
        ("avx512", "avx512", "AVX512_CORE_BF16", "AVX512"),
    )
}
"""Environment variables by level, read when torch is imported. None has fp16; "avx512" has bf16."""
