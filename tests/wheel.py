"""What `make build` asks of an installed wheel: it is the one that runs, and it is complete."""

from pathlib import Path

import stretto
from stretto.diffusion.shipped.load import PIPELINES, load

home = Path(stretto.__file__).parent
assert home.parent.name == "site-packages", f"{home} is not an installed wheel"
assert "clean" in home.parts, f"{home} is borrowed, not installed from the wheel"
assert (home / "py.typed").exists(), "py.typed is not in the wheel"
for name in stretto.__all__:
    getattr(stretto, name)
for name in PIPELINES:
    load(name)
