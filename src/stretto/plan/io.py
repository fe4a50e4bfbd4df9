"""Plan files: documents whose faults are a PlanMismatch, as those of a plan made in code are."""

from __future__ import annotations

import os

from stretto import documents
from stretto.errors import PlanMismatch
from stretto.plan.model import Plan

SCHEMA = "plan/1"


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file. Raises ConfigError (no file, no YAML), PlanMismatch (schema, fields)."""
    return parse_plan(read_document(path, SCHEMA), source=str(path))


def parse_plan(fields: dict, *, source: str = "plan") -> Plan:
    """A Plan from plain data. Raises PlanMismatch naming every wrong field with its path."""
    try:
        return Plan(**{str(name): value for name, value in fields.items()})
    except PlanMismatch as error:
        raise PlanMismatch(f"{source}: {error}") from None


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan file; an existing file is replaced at once or not at all. Raises ConfigError."""
    documents.write(plan, path, SCHEMA)


def read_document(path: str | os.PathLike[str], schema: str) -> dict:
    """The fields of a file that belongs to a plan. Raises ConfigError, PlanMismatch (schema)."""
    return documents.read(path, schema, mismatch=PlanMismatch).fields


def write_document(fields: dict, path: str | os.PathLike[str], schema: str) -> None:
    """Write a file that belongs to a plan, at once or not at all. Raises ConfigError."""
    documents.write_fields(fields, path, schema)
