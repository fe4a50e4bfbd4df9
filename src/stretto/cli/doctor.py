"""`stretto doctor`: what this machine has, what works on it, and what to install.

Each capability is tried, not guessed: libraries are imported, ffmpeg is started, an operator
runs on the device. Nothing is downloaded and nothing is written.
"""

from __future__ import annotations

import importlib
import importlib.util
import json as jsonlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import stretto
from stretto.cluster import detect

#: Oldest torch that stretto is written for; the same bound as in `pyproject.toml`.
OLDEST_TORCH = (2, 11)
PYPI = "https://pypi.org/simple"
GLOO = "let this host resolve its own name (hostname -f), or set GLOO_SOCKET_IFNAME=lo"


@dataclass(frozen=True)
class Check:
    """One capability: whether it works here, what was seen, and what mends it if it does not."""

    name: str
    works: bool
    seen: str
    fix: str
    essential: bool


class Unmet(Exception):
    """A trial that ran and found the capability absent; its text is what was seen.

    `fix` replaces the trial's own way out where another one applies.
    """

    def __init__(self, seen: str, fix: str | None = None):
        super().__init__(seen)
        self.fix = fix


@dataclass(frozen=True)
class Trial:
    """A way to find out: `run` returns what it saw, or raises `Unmet` or a library's error."""

    name: str
    run: Callable[[], str]
    fix: str
    essential: bool = False

    def check(self) -> Check:
        """Run it once. What a missing or broken library raises is a finding here."""
        try:
            return Check(self.name, True, self.run(), "", self.essential)
        except Unmet as unmet:
            seen, fix = str(unmet), self.fix if unmet.fix is None else unmet.fix
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            seen, fix = str(_root(error)).strip(), self.fix
        return Check(self.name, False, seen.partition("\n")[0], fix, self.essential)


@dataclass
class Report:
    """All that `stretto doctor` found. `machine` and `libraries` are facts, `checks` verdicts."""

    machine: dict[str, str | int | float]
    libraries: dict[str, dict[str, str | None]]
    checks: list[Check]
    warnings: list[str]

    @property
    def healthy(self) -> bool:
        """True when every essential check works; an absent extra is a choice, not an illness."""
        return all(check.works for check in self.checks if check.essential)


def doctor(*, json: bool = False) -> int:
    """What works on this machine, and what to install. Exit 1 if something essential is broken.

    Parameters
    ----------
    json
        Print one JSON object instead of tables.
    """
    report = examine()
    if json:
        print(jsonlib.dumps({**asdict(report), "healthy": report.healthy}, indent=2))
    else:
        _show(report, Console())
    return 0 if report.healthy else 1


def examine() -> Report:
    """Look at this machine and try each capability once. Takes a few seconds, mostly imports."""
    return Report(machine(), libraries(), [trial.check() for trial in trials()], warnings())


def machine() -> dict[str, str | int | float]:
    """Facts of the operating system; memory in bytes, load is the one-minute average."""
    own = detect.cpu()
    return {
        "stretto": stretto.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "os": platform.platform(),
        "processor": own.name,
        "cores": own.count,
        "memory_bytes": own.memory_bytes,
        "load": round(os.getloadavg()[0], 2),
    }


def requirements() -> dict[str, list[str]]:
    """What this installation of stretto declares: by extra, "core" for the unconditional."""
    found: dict[str, list[str]] = {}
    for line in metadata.requires("stretto") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        found.setdefault(extra[1] if extra else "core", []).append(requirement.strip())
    return found


def libraries() -> dict[str, dict[str, str | None]]:
    """Installed version of each requirement, None where absent, grouped as `requirements`."""
    return {
        extra: {name: _version(name) for name in map(_distribution, lines)}
        for extra, lines in requirements().items()
    }


def warnings() -> list[str]:
    """Conditions under which everything works, but worse than it could."""
    found = []
    torch = importlib.util.find_spec("torch")
    if sys.dont_write_bytecode and torch and not Path(str(torch.cached)).exists():
        found.append(
            "PYTHONDONTWRITEBYTECODE is set and torch has no bytecode: every rank compiles it "
            f"anew. Unset it, or once run: {sys.executable} -m compileall -q "
            + str(Path(str(torch.origin)).parent)
        )
    if detect.usable_cores() < 2:
        found.append("1 core: ranks take turns, so no speed-up can show here; use --emulate")
    if os.getloadavg()[0] > detect.usable_cores():
        found.append(
            f"load {os.getloadavg()[0]:.1f} on {detect.usable_cores()} cores: do not time here"
        )
    return found


def try_torch() -> str:
    """torch imports, is recent enough and multiplies two matrices."""
    import torch  # not at the top: without torch this command must still run

    seen = f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        raise Unmet(f"{seen}, needs {'.'.join(map(str, OLDEST_TORCH))}")
    _multiply(torch, "cpu")
    return seen


def try_torchvision() -> str:
    """torchvision is absent or fits torch; one of another build breaks `import transformers`."""
    version = _version("torchvision")
    if version is None:
        return "not installed, not needed"
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise Unmet(f"{version} beside torch {_version('torch')}: {error}") from error
    return version


def try_ranks() -> str:
    """Two ranks find one another and sum a number over gloo, which carries ranks anywhere."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        raise Unmet("this torch is built without gloo")
    store = dist.HashStore()

    def rank(own: int) -> float:
        # Two threads instead of two processes: the same sockets, none of the start-up.
        group: Any = dist.ProcessGroupGloo(store, own, 2, timedelta(seconds=20))
        number = torch.tensor([own + 1.0])
        group.allreduce([number]).wait()
        return number.item()

    with ThreadPoolExecutor(2) as pool:
        sums = list(pool.map(rank, range(2)))
    if sums != [3.0, 3.0]:
        raise Unmet(f"1 + 2 summed over gloo is {sums}")
    nccl = " and NCCL" if dist.is_nccl_available() else ""
    cores = detect.usable_cores()
    return f"gloo{nccl}; {cores} cores, so up to {cores} CPU ranks gain speed"


def try_gpu() -> str:
    """A CUDA device multiplies two matrices."""
    import torch

    if torch.cuda.is_available():
        _multiply(torch, "cuda")
        return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    if found := detect.gpus():
        seen = ", ".join(f"{gpu.count} x {gpu.name}" for gpu in found)
        raise Unmet(f"{seen}, but torch {torch.__version__} sees none")
    raise Unmet("no CUDA device; everything also runs on the CPU", fix="")


def try_images() -> str:
    """A text-to-image pipeline imports, with its text encoders, and so does what writes PNG."""
    importlib.import_module("PIL.Image")
    _load("diffusers", "StableDiffusion3Pipeline")
    return f"diffusers {_version('diffusers')}, transformers {_version('transformers')}"


def try_video() -> str:
    """A video pipeline imports and ffmpeg starts."""
    _load("diffusers", "CogVideoXPipeline")
    ffmpeg = importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    done = subprocess.run(
        [ffmpeg, "-version"], check=False, capture_output=True, text=True, timeout=20
    )
    if done.returncode:
        raise Unmet(f"{ffmpeg} -version ended with {done.returncode}: {done.stderr}")
    return " ".join(done.stdout.split()[:3])


def try_audio() -> str:
    """A text-to-audio pipeline imports; WAV is written by the standard library."""
    _load("diffusers", "AudioLDM2Pipeline")
    return "WAV"


def _load(module: str, name: str) -> None:
    """Import a name of a lazy module: only then are its own requirements imported."""
    # transformers advises to install torchvision, which beside a CPU torch would break it.
    importlib.import_module("transformers").logging.set_verbosity_error()
    if getattr(getattr(importlib.import_module(module), name), "_backends", None):
        raise Unmet(f"{module} is here, but {name} lacks one of its requirements")


def _multiply(torch: ModuleType, device: str) -> None:
    ones = torch.ones(8, 8, device=device)
    if not bool((ones @ ones == 8).all()):
        raise Unmet(f"ones(8, 8) @ ones(8, 8) is not 8 on {device}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _root(error: BaseException) -> BaseException:
    """The first error of a chain; lazy modules report only that something went wrong."""
    while before := error.__cause__ or error.__context__:
        error = before
    return error


def _distribution(requirement: str) -> str:
    """`torch` of `torch>=2.11`."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def _install(extra: str) -> str:
    """The command that installs what is missing of an extra, however stretto itself came here.

    Empty when nothing is missing: then something else is broken, and installing mends nothing.
    """
    missing = [r for r in requirements().get(extra, []) if _version(_distribution(r)) is None]
    return _pip("install", *missing) if missing else ""


def trials() -> tuple[Trial, ...]:
    """Every capability, in the order shown."""
    generation = _install("diffusion")
    return (
        Trial("torch", try_torch, _pip("install", "-U", "torch>=2.11"), essential=True),
        Trial("torchvision", try_torchvision, _pip("uninstall", "torchvision"), essential=True),
        Trial("ranks over gloo", try_ranks, GLOO, essential=True),
        # The wheels of pypi.org are built with CUDA, on Linux.
        Trial("GPU", try_gpu, _pip("install", "--force-reinstall", "torch", "-i", PYPI)),
        Trial("generate images", try_images, generation),
        Trial("generate video", try_video, generation),
        Trial("generate audio", try_audio, generation),
    )


def _show(report: Report, console: Console) -> None:
    console.print(_machine_line(report.machine), highlight=False)
    table = Table("", "capability", "found here", box=None, pad_edge=False)
    for check in report.checks:
        mark = "[green]yes[/]" if check.works else "[red]no[/]" if check.essential else "no"
        table.add_row(mark, check.name, Text(check.seen))
    console.print(table)
    for extra, versions in report.libraries.items():
        known = [f"{name} {version}" for name, version in versions.items() if version]
        missing = [name for name, version in versions.items() if not version]
        line = ", ".join(known) + (f"; missing: {', '.join(missing)}" if missing else "")
        console.print(Text(f"{extra}: {line}", style="dim"))
    for warning in report.warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning))
    for fix in dict.fromkeys(check.fix for check in report.checks if check.fix):
        console.print(Text.assemble(("to mend: ", "bold"), fix), soft_wrap=True)


def _machine_line(facts: dict[str, str | int | float]) -> str:
    memory = float(facts["memory_bytes"]) / 2**30
    return (
        f"stretto {facts['stretto']}, Python {facts['python']}, {facts['os']}\n"
        f"{facts['processor']}: {facts['cores']} cores, {memory:.1f} GiB, load {facts['load']}"
    )
