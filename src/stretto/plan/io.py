"""Plan files: YAML with a schema line, read strictly and written atomically."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from stretto.errors import ConfigError, PlanMismatch
from stretto.plan.model import Plan

SCHEMA = "plan/1"


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file. Raises ConfigError (no file, no YAML), PlanMismatch (schema, fields)."""
    document = read_document(path, SCHEMA)
    return parse_plan(document, source=str(path))


def parse_plan(fields: dict, *, source: str = "plan") -> Plan:
    """A Plan from plain data; every wrong field is named with its path."""
    try:
        return Plan(**fields)
    except PlanMismatch as error:
        raise PlanMismatch(f"{source}: {error}") from None


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan file; an existing file is replaced at once or not at all."""
    write_document(plan.model_dump(mode="json", exclude_none=True), path, SCHEMA)


def read_document(path: str | os.PathLike[str], schema: str) -> dict:
    """The fields of a stretto YAML document whose first key names `schema`."""
    try:
        document = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(document, dict) or document.get("stretto") != schema:
        seen = document.get("stretto") if isinstance(document, dict) else type(document).__name__
        raise PlanMismatch(
            f"{path} has schema {seen!r}, needed is {schema!r} in its key `stretto`; "
            "write it anew with this version of stretto"
        )
    return {key: value for key, value in document.items() if key != "stretto"}


def write_document(fields: dict, path: str | os.PathLike[str], schema: str) -> None:
    """Write a stretto YAML document aside, then rename it into place."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(yaml.safe_dump({"stretto": schema, **fields}, sort_keys=False))
        aside.replace(target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {target}: {error.strerror}") from None
