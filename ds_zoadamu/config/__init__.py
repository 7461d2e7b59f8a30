"""The DeepSpeed JSON: read once, its "auto" values filled, the options of the rules parsed, what cannot work refused."""

from .settings import Config, load

__all__ = ["Config", "load"]
