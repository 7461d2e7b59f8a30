"""The configurations that come with the package: ds_configs/ of the repository."""

from pathlib import Path

from ..errors import ConfigError, nearest, shown

FOLDER = Path(__file__).parents[1] / "configs"


def names() -> list[str]:
    """Of all of them."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def file_of(source: str | Path) -> str | Path:
    """A path as it is; where there is no such file, that of the configuration of this name, if there is one. Raises ConfigError
    for a bare word that is neither."""
    if not isinstance(source, str) or Path(source).exists():
        return source
    is_word = "/" not in source and not source.endswith(".json")
    return path_of(source) if is_word or source.removesuffix(".json") in names() else source


def path_of(name: str) -> Path:
    """The file of a configuration. Raises ConfigError for an unknown name."""
    known = names()
    if name.removesuffix(".json") not in known:
        near = nearest(name, known)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"there is no configuration {shown(name)}{hint} Known: {', '.join(known)}")
    return FOLDER / f"{name.removesuffix('.json')}.json"
