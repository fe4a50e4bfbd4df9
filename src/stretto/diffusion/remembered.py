"""What an attachment keeps between calls: outputs by form, and which denoisers may be cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stretto.diffusion.denoise import mapped, tensors_of
from stretto.diffusion.kept import Kept

#: Forms of calls kept between generations; a service sees many prompt lengths.
_KEPT = 8


class Remembered:
    """Denoiser outputs by form of call: what a rank hands the pipeline where another evaluates.

    A pipeline may write into what it got: an output that was written into is handed out as copies
    from then on. `verified` names the modules whose batch was cut once and compared with the whole.
    """

    def __init__(self) -> None:
        self.verified: set[str] = set()
        self._outputs: dict[tuple, tuple[Any, list[Kept]]] = {}

    def __contains__(self, key: tuple) -> bool:
        return key in self._outputs

    def get(self, key: tuple) -> Any:
        """The output remembered under `key`, as it was; None if there is none."""
        if key not in self._outputs:
            return None
        # Used again, so among the newest that `trim` leaves.
        output, tensors = self._outputs[key] = self._outputs.pop(key)
        kept = iter(tensors)
        return mapped(lambda _: next(kept).restored(), output)

    def put(self, key: tuple, output: Any) -> None:
        """Remember an output; its own memory may be the denoiser's, to be used again."""
        self._outputs.pop(key, None)
        own = mapped(Tensor.clone, output)
        self._outputs[key] = own, [Kept(tensor) for tensor in tensors_of(own)]

    def trim(self) -> None:
        """Forget all but the newest forms; at the start of a call, so that ranks agree."""
        for key in list(self._outputs)[:-_KEPT]:
            del self._outputs[key]
