"""What an attachment keeps between calls: outputs by form, and which denoisers may be cut."""

from __future__ import annotations

from typing import Any

from stretto.diffusion.denoise import mapped

#: Forms of calls kept between generations; a service sees many prompt lengths.
_KEPT = 8


class Remembered:
    """Denoiser outputs by form of call: what a rank hands the pipeline where another evaluates.

    Copies go in and out, so that a pipeline may write into what it got. `verified` names the
    modules whose batch was cut once and compared with the whole.
    """

    def __init__(self) -> None:
        self.verified: set[str] = set()
        self._outputs: dict[tuple, Any] = {}

    def __contains__(self, key: tuple) -> bool:
        return key in self._outputs

    def get(self, key: tuple) -> Any:
        """A copy of the output remembered under `key`, None if there is none."""
        output = self._outputs.get(key)
        return None if output is None else mapped(lambda t: t.clone(), output)

    def put(self, key: tuple, output: Any) -> None:
        self._outputs.pop(key, None)
        self._outputs[key] = mapped(lambda t: t.clone(), output)

    def trim(self) -> None:
        """Forget all but the newest forms; at the start of a call, so that ranks agree."""
        for key in list(self._outputs)[:-_KEPT]:
            del self._outputs[key]
