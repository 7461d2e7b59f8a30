"""``ds_zoadamu configs list|show|write``: the DeepSpeed configurations that come with the package."""

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files.safetensors_io import write_durably
from .shipped import names, path_of


def add_arguments(parser: Any) -> None:
    """The arguments of ``ds_zoadamu configs``."""
    parser.add_argument("what", choices=("list", "show", "write"))
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a configuration, see list")
    parser.add_argument("file", nargs="?", metavar="FILE", help="that write makes (default: NAME.json here)")


def run(args: Any) -> int:
    """Print names or a configuration, or write it; returns the exit status. Raises ConfigError."""
    if args.what == "list":
        print("\n".join(names()))
        return 0
    if args.name is None:
        raise ConfigError(f"configs {args.what}: name a configuration: {', '.join(names())}")
    text = path_of(args.name).read_text()
    if args.what == "show":
        print(text, end="")
        return 0
    target = Path(args.file or path_of(args.name).name)
    if target.exists():
        raise ConfigError(f"{str(target)!r} exists; name another file")
    write_durably(target, text.encode())
    print(f"wrote {target}")
    return 0
