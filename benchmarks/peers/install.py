"""Peers' own code, fetched into a folder that is thrown away: none of it is kept here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: What pip installs for each peer, at the commit that was compared.
SOURCES = {
    "ring-flash-attention": "git+https://github.com/zhuzilin/ring-flash-attention"
    "@899628238f2f5bb8c028579c89b7cd56ea451d2a",
    "yunchang": "git+https://github.com/feifeibear/long-context-attention"
    "@56118e0d8fe377d43441226dd8bdd07135c92c22",
}
#: What they import besides torch.
NEEDED = ("einops==0.8.1",)


def install(folder: Path, sources: dict[str, str]) -> None:
    """Install the peers alone, without what they depend on: flash-attn has no CPU build."""
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*words, str(folder), *NEEDED, *sources.values()], check=True)


def commit_of(source: str) -> str:
    """The commit that a source names, the source itself if it names none."""
    return source.rpartition("@")[2][:7] if "@" in source else source
