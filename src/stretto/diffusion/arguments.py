"""Whose mistake it is when the call of a pipeline raises: the arguments', or the product's."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from stretto.errors import ConfigError, StrettoError

_CAUSES = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)
#: Characters at either end of a message that are kept.
_HALF = 300
#: Errors of the device, which no argument's value explains.
_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)
#: Modules whose mistakes are not the arguments'; the shipped pipelines take arguments like others.
_OURS, _SHIPPED = ("stretto.", "torch.distributed"), "stretto.diffusion.shipped"


@contextmanager
def naming_arguments(pipe: Any, given: Mapping[str, Any]) -> Iterator[None]:
    """Around calls of a pipeline: what it cannot take is a ConfigError that names what was given.

    Pipelines check little, so a wrong value is any error from inside of them. Errors of stretto,
    errors that its own code raises, and those of the device pass as they are.
    """
    try:
        yield
    except StrettoError:
        raise
    except _CAUSES as error:
        if isinstance(error, _DEVICE) or _is_ours(error):
            raise
        shown = ", ".join(f"{name}={value!r:.40}" for name, value in given.items())
        raise ConfigError(
            f"{type(pipe).__name__} cannot be called so: {type(error).__name__}: {_brief(error)}\n"
            f"  it was given: {shown or 'nothing but steps and a generator'}\n"
            "  to fix: mend the value, or pass what is missing with --set"
        ) from error


def _brief(error: BaseException) -> str:
    """What it says, without the middle where that is long: pipelines print whole tensors."""
    text = " ".join(str(error).split())
    return text if len(text) <= 2 * _HALF else f"{text[:_HALF]} [...] {text[-_HALF:]}"


def _is_ours(error: BaseException) -> bool:
    """Whether the frame that raised is of the product, or of the exchange beneath it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return module.startswith(_OURS) and not module.startswith(_SHIPPED)
