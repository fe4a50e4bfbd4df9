"""Files of the nouns: YAML with a schema line, read strictly, written at once or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from stretto.errors import ConfigError

Noun = TypeVar("Noun", bound=BaseModel)
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """The fields of a file, and the line on which each of them stands."""

    source: str
    fields: dict[str, Any]
    lines: dict[Place, int]


def read(
    path: str | os.PathLike[str], schema: str, *, mismatch: type[ConfigError] = ConfigError
) -> Document:
    """A document whose first key is `stretto: <schema>`.

    Raises ConfigError (no file, no YAML), `mismatch` for a file of another noun or version.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        fields, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    seen = fields.get("stretto") if isinstance(fields, dict) else None
    if seen != schema:
        raise mismatch(
            f"{path} starts with `stretto: {seen}`, needed is `stretto: {schema}`\n"
            "  why: the first key says which noun and which version of it a file holds"
        )
    rest = {key: value for key, value in fields.items() if key != "stretto"}
    return Document(str(path), rest, dict(_lines(root)))


def load(noun: type[Noun], document: Document) -> Noun:
    """The noun a document describes. Raises ConfigError: file, line and path of each fault."""
    try:
        return noun.model_validate(document.fields)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaint(e, document) for e in _errors(error))) from None


def make(noun: type[Noun], fields: dict[str, Any]) -> Noun:
    """The noun from arguments of a call. Raises ConfigError naming each field at fault."""
    return load(noun, Document(noun.__name__, fields, {}))


def write(noun: BaseModel, path: str | os.PathLike[str], schema: str) -> None:
    """Write a noun aside, then rename it into place. Raises ConfigError."""
    write_fields(noun.model_dump(mode="json", exclude_none=True), path, schema)


def write_fields(fields: dict[str, Any], path: str | os.PathLike[str], schema: str) -> None:
    """Write plain fields aside, then rename them into place. Raises ConfigError."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({"stretto": schema, **fields}, sort_keys=False, allow_unicode=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {target}: {error.strerror}") from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError before minutes of measuring, not after. Makes nothing."""
    file = Path(path)
    if cause := _obstacle(file):
        raise ConfigError(f"cannot write {file}: {cause}; give --out a file in a folder of yours")


def _obstacle(file: Path) -> str:
    try:
        if file.is_dir():
            return "it is a folder"
        folder = next(parent for parent in file.absolute().parents if parent.exists())
    except OSError as error:
        # A name that is too long, or too many links.
        return str(error.strerror)
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    return "" if writable else f"nothing can be written into {folder}"


def _errors(error: ValidationError) -> Sequence[Any]:
    return error.errors(include_url=False)


def _complaint(error: Any, document: Document) -> str:
    place: Place = error["loc"]
    lines = [
        document.lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in document.lines
    ]
    where = f"{document.source}:{lines[0]}" if lines else document.source
    cause = error.get("ctx", {}).get("error")
    reason = str(cause) if cause else error["msg"]
    if not cause and error["type"] != "missing":
        reason += f" (got {error['input']!r})"
    field = ".".join(map(str, place))
    return f"{where}: {field}: {reason}" if field else f"{where}: {reason}"


def _lines(node: yaml.Node | None, place: Place = ()):
    """(place, line) of every key and item below a node; lines count from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*place, key.value), key.start_mark.line + 1
            yield from _lines(value, (*place, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*place, index), value.start_mark.line + 1
            yield from _lines(value, (*place, index))
