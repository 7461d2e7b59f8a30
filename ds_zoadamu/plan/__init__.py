"""What fits: bytes a GPU and seconds a step of a zeroth-order run, worked out before any weight is loaded.

Nothing here needs a GPU, a process group or DeepSpeed: the model is built and run once on the meta device, and ZeRO-3's gathers
are followed on paper. All sizes are in bytes, all GB decimal (10^9 bytes).
"""
