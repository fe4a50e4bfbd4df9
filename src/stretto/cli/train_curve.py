"""The loss curve as a page, and as a picture where a library can draw one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_INSTALL = "pip install 'stretto[plots]'"


def draw(folder: Path, metrics: list[dict[str, Any]], title: str) -> tuple[list[str], list[str]]:
    """Write curve.html and curve.png into a folder; names written, remarks on what was not.

    The page holds plotly's own code, so it opens without a network.
    """
    try:
        from plotly import graph_objects
    except ImportError:
        return [], [f"no loss curve: plotly is missing; {_INSTALL}"]
    figure = graph_objects.Figure()
    for kind, name, mode in (("stepped", "training", "lines"), ("validated", "held out", None)):
        rows = [row for row in metrics if row["event"] == kind]
        x, y = [row["step"] for row in rows], [row["loss"] for row in rows]
        figure.add_scatter(x=x, y=y, name=name, mode=mode or "lines+markers")
    figure.update_layout(
        title=title, xaxis_title="step", yaxis_title="loss", template="plotly_white"
    )
    figure.write_html(folder / "curve.html", include_plotlyjs=True)
    remark = _picture(figure, folder / "curve.png")
    return ["curve.html"] + ["curve.png"] * (not remark), [remark] * bool(remark)


def _picture(figure: Any, file: Path) -> str:
    """Write a PNG; why not, or ""."""
    try:
        figure.write_image(file, width=900, height=500)
    except (ValueError, RuntimeError, ImportError) as error:
        # Plotly's exporter is kaleido, which drives a browser; either may be missing.
        file.unlink(missing_ok=True)
        return (
            f"no curve.png ({type(error).__name__} of plotly's exporter): pip install kaleido, and "
            "plotly_get_chrome for its browser"
        )
    return ""
