"""`stretto bench`: measurements behind the figures, each one table and one result file."""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter, validators

from stretto.cli.whole import AT_LEAST_1, whole
from stretto.errors import ConfigError

app = App(
    name="bench", help="Measure: exactness of every pipeline and plan, speed and fidelity of ranks."
)

_Out = Annotated[Path, Parameter(name=("--out", "-o"))]
_Ranks = Annotated[int, Parameter(converter=whole, validator=validators.Number(gte=2, lte=8))]


@app.command(name="exactness")
def bench_exactness(
    *,
    only: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    ranks: _Ranks = 3,
    out: _Out = Path("exactness.json"),
    json: bool = False,
) -> int:
    """Check every pipeline and scheduler known here against itself, bit for bit.

    Takes about three minutes on two cores. Exit code 1 if a case is neither exact nor refused.

    Parameters
    ----------
    only
        Names of cases, all by default.
    ranks
        Processes that share the steps.
    out
        Where the result is written.
    json
        Print the result as JSON.
    """
    from stretto.bench import exactness

    result = _measured(partial(exactness.run, only or (), ranks=ranks), out, json)
    return 1 if result["summary"]["wrong"] else 0


@app.command(name="steps")
def bench_steps(
    *,
    repeats: Annotated[int, AT_LEAST_1] = 5,
    quick: bool = False,
    out: _Out = Path("steps.json"),
    json: bool = False,
) -> int:
    """Measure steps in parallel on the shipped models: two ranks' speed, fidelity at equal depth.

    Takes about eight minutes on two idle cores. The file is there after the timed part and grows
    with every method; "complete" in it says whether all of it was measured.

    Parameters
    ----------
    repeats
        Interleaved rounds of the timed methods, 1 at least; below 3 the median says little.
    quick
        A few steps of one picture: shows that everything runs, measures nothing worth quoting.
    out
        Where the result is written.
    json
        Print the result as JSON.
    """
    from stretto.bench import steps

    size = steps.QUICK if quick else steps.FULL
    _measured(partial(steps.run, size, repeats=repeats, keep=_keeping(out)), out, json)
    return 0


@app.command(name="attention")
def bench_attention(
    *,
    quick: bool = False,
    out: _Out = Path("attention.json"),
    json: bool = False,
) -> int:
    """Check every attention plan against one device in float64, and every byte that it sends.

    Takes at most nine minutes, on two cores about six. The file grows every few seconds;
    "complete" in it says whether all was run. Exit code 1 if anything is wrong.

    Parameters
    ----------
    quick
        Up to 4 ranks only.
    out
        Where the result is written.
    json
        Print the result as JSON.
    """
    from stretto.bench import attention

    size = attention.QUICK if quick else attention.FULL
    result = _measured(partial(attention.run, size, keep=_keeping(out)), out, json)
    return 1 if result["summary"]["wrong"] else 0


@app.command(name="links")
def bench_links(
    *,
    rate: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 20.0,
    repeats: Annotated[int, AT_LEAST_1] = 5,
    layouts: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    quick: bool = False,
    out: _Out = Path("links.json"),
    json: bool = False,
) -> int:
    """Time every attention plan on emulated nodes: network namespaces with links of one rate.

    Needs root and iproute2. Takes about twelve minutes on two cores, which must be idle. The file
    grows with every case; "complete" in it says whether all was run.

    Parameters
    ----------
    rate
        Mbit/s of every node's link, each way. Lower on a slower machine: links must be the
        bottleneck, not its cores. Plans of the headline are timed at four times this rate too.
    repeats
        Interleaved rounds at most, 1 at least. Where the minutes of a case do not suffice it has
        fewer, but 3 at least if as many were asked for.
    layouts
        Nodes x ranks of each, all by default: 2x8, 4x4, 2x4, 8x2.
    quick
        Two nodes of two ranks: shows that everything runs, measures nothing worth quoting.
    out
        Where the result is written.
    json
        Print the result as JSON.
    """
    from dataclasses import replace

    from stretto.bench import links
    from stretto.bench.result import write

    def keep(found: dict[str, Any]) -> None:
        # A disk that is full for a moment ends no measurement; the last write raises.
        with contextlib.suppress(ConfigError):
            write(out, found)

    size = links.QUICK if quick else replace(links.FULL, repeats=repeats)
    if layouts:
        size = size.only(layouts)
    size = replace(size, rate=rate * 1e6 / 8, fast_rate=rate * 1e6 / 2)
    with _measuring(out, json) as say:
        result = links.run(size, say=say, keep=keep)
    _finish(result, out, json)
    return 0


@app.command(name="families")
def bench_families(
    *,
    only: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    ranks: _Ranks = 2,
    out: _Out = Path("families.json"),
    json: bool = False,
) -> int:
    """Compare every causal-LM family of the installed transformers on ranks with itself on one.

    Loss, logits and gradients of tiny random models. Takes half a minute on two idle cores; the
    file grows every few seconds, and "complete" in it says whether all was run. Exit code 1 if a
    family is neither equal nor refused.

    Parameters
    ----------
    only
        Names of families (model types), all by default.
    ranks
        Processes that share the sequence.
    out
        Where the result is written.
    json
        Print the result as JSON.
    """
    from stretto.bench import families

    work = partial(families.run, only or (), ranks=ranks, keep=_keeping(out))
    result = _measured(work, out, json)
    return 1 if result["summary"]["wrong"] or result["summary"]["failed"] else 0


@app.command(name="train")
def bench_train(
    *,
    quick: bool = False,
    out: _Out = Path("train.json"),
    json: bool = False,
) -> int:
    """Train on 1, 2 and 4 ranks: equal losses, a rank that is killed, two ranks' speed.

    Takes about four minutes on two idle cores. Exit code 1 if losses differ by more than 1e-9 in
    float64, the killed rank is not named or resuming is not bitwise.

    Parameters
    ----------
    quick
        Two steps on 1 and 2 ranks: shows that everything runs, measures nothing worth quoting.
    out
        Where the result is written.
    json
        Print the result as JSON.
    """
    from stretto.bench import train

    size = train.QUICK if quick else train.FULL
    result = _measured(partial(train.run, size, keep=_keeping(out)), out, json)
    return 0 if train.is_right(result["summary"]) else 1


def _measured(work: Callable[..., dict[str, Any]], out: Path, json: bool) -> dict[str, Any]:
    """The result of `work(say=...)`, written and shown."""
    with _measuring(out, json) as say:
        result = work(say=say)
    _finish(result, out, json)
    return result


def _keeping(out: Path) -> Callable[[dict[str, Any]], None]:
    """Writes what there is of a result while it grows."""
    from stretto.bench.result import write

    def keep(found: dict[str, Any]) -> None:
        # A disk that is full for a moment ends no measurement; the last write raises.
        with contextlib.suppress(ConfigError):
            write(out, found)

    return keep


@contextlib.contextmanager
def _measuring(out: Path, quiet: bool) -> Iterator[Any]:
    """Progress on the terminal; a file that cannot be written is refused first."""
    from rich.console import Console

    from stretto.documents import check_writable

    check_writable(out)
    with _quiet_libraries(), Console(stderr=True, quiet=quiet).status("starting") as status:

        def say(stage: str, done: int = 0, total: int = 0) -> None:
            far = f" ({done} of {total})" if total else ""
            status.update(f"{stage}{far}")

        yield say


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Tiny random models give diffusers and transformers much to remark; ranks inherit this."""
    quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    quiet["DIFFUSERS_VERBOSITY"] = "error"
    before = dict(os.environ)
    os.environ.update(quiet)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in quiet:
            os.environ.pop(name)
        os.environ.update({name: before[name] for name in quiet if name in before})


def _finish(result: dict[str, Any], out: Path, json: bool) -> None:
    from stretto.bench.result import write
    from stretto.cli.bench_table import show
    from stretto.diffusion.output import finite

    write(out, result)
    if json:
        print(jsonlib.dumps(finite(result), indent=2, allow_nan=False))
    else:
        show(result, out)
