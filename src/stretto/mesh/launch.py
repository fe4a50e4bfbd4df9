"""Start ranks on this machine, follow them, and bring back what they return or why they failed.

torchrun's Python API starts and supervises the processes. What crosses between a rank and its
parent lies in files of one temporary folder, each written aside and renamed: notes (the latest
sign of life), results, errors. So the parent knows what a rank did last even after it was killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from stretto import errors
from stretto.errors import LaunchError, MeshTimeout, RankLost, StrettoError
from stretto.mesh.heap import keep_freed

#: Tells the parent what this rank is doing: a stage, and optionally how far it is.
Tell = Callable[..., None]
#: What the parent gets: rank, and the fields of the note.
OnNote = Callable[[int, dict], None]

#: Imported once by the server that ranks are forked from. torch._dynamo and torch.optim come with
#: diffusers; named here so that a server started for a smaller job serves a larger one as well.
PRELOAD = ("torch", "torch.distributed", "torch.optim", "torch._dynamo", "stretto.mesh.join")
#: Seconds between a peer's failure and the end of the others: time to write down what they saw.
GRACE_S = 3.0
#: Seconds that ranks may take to appear: importing torch without bytecode on a busy machine.
START_S = 120.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class _Job:
    """What every rank gets."""

    entry: Callable
    args: tuple
    folder: str
    threads: int
    path: tuple[str, ...] = field(default_factory=lambda: tuple(sys.path))


def prepare(preload: Sequence[str] = (), *, threads: int = 1) -> None:
    """Start importing torch and `preload` in the background, in the server ranks come from.

    Worth calling as early as possible, before this process imports torch itself. A second call
    does nothing. Ctrl-C in the terminal is for this process alone: the server does not hear it, a
    rank only once it has begun.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *preload])
    # The server would start the tracker, which lets interrupts through once it runs.
    resource_tracker.ensure_running()
    # Thread pools read this once, when torch is imported.
    with _environment("OMP_NUM_THREADS", str(threads)), _interrupts_held():
        forkserver.ensure_running()


def abandon() -> None:
    """End the server that `prepare` started, wherever it is in its imports, for who goes at once.

    Ranks that it was asked for and has not begun would find nobody that they belong to.
    """
    server = _server()
    if server is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


def _server() -> int | None:
    """The process that ranks are forked from, None before it was started."""
    # The standard library's own name: without it the server still ends, after its imports.
    return getattr(forkserver._forkserver, "_forkserver_pid", None)


def launch(
    entry: Callable[..., Any],
    *args: Any,
    ranks: int,
    timeout_s: float,
    threads: int = 1,
    preload: Sequence[str] = (),
    on_note: OnNote | None = None,
) -> list[Any]:
    """Run module-level `entry(tell, *args)` on `ranks` processes; results in rank order.

    Arguments and results are pickled. Each rank has `threads` threads and torchrun's environment,
    so `init_mesh(plan)` works inside. `tell(stage, **more)` is a rank's sign of life; each note
    reaches `on_note` in this process. One rank runs in this process, without a launcher.
    All processes have ended when it returns. Raises what a rank raised: errors of the tree in
    their own type, others as LaunchError, both with the rank's traceback in `__notes__`;
    RankLost when a rank dies, or when no rank gives a sign for `timeout_s` seconds; a note may ask
    for more until the next one, with `patience_s=`. A stopped server of ranks (SIGSTOP) is no
    exception: it is named, and ended, as nobody else could say that its ranks have.
    """
    if ranks == 1:
        return [_here(entry, args, threads, on_note)]
    prepare(preload, threads=threads)
    # A rank that a signal is just ending may still write into the folder while it is removed.
    with tempfile.TemporaryDirectory(prefix="stretto-", ignore_cleanup_errors=True) as folder:
        job = _Job(entry, args, folder, threads)
        watch = _Watch(Path(folder), ranks, timeout_s, on_note)
        with watch, _quiet_launcher():
            failure = _start(job, ranks)
        return watch.outcome(failure)


# ---- the parent ------------------------------------------------------------------------------


def _start(job: _Job, ranks: int) -> str:
    """Run the ranks to their end; what torchrun says of a failure, "" if there was none."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=Path(job.folder).name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=_POLL_S,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(job.folder) / "logs")),
    )
    try:
        elastic_launch(config, _rank)(job)
    except ChildFailedError as error:
        return "; ".join(
            f"rank {rank} ended with exit code {failure.exitcode}"
            for rank, failure in sorted(error.failures.items())
        )
    except SignalException as asked:
        # torchrun's own exception would look like a bug to whoever pressed Ctrl-C.
        if asked.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + asked.sigval) from None
    except (EOFError, ConnectionError):
        # How the standard library says it: a pipe to the server that has no other end any more.
        return "the server that ranks are forked from ended before it had begun them"
    return ""


class _Watch:
    """Follows the ranks' notes in a thread, and ends them all when none gives a sign of life."""

    def __init__(self, folder: Path, ranks: int, timeout_s: float, on_note: OnNote | None):
        self.folder = folder
        self.ranks = ranks
        self.timeout_s = timeout_s
        self.on_note = on_note
        self.notes: dict[int, dict] = {}
        self.stalled = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch-ranks", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._read()

    def outcome(self, failure: str) -> list[Any]:
        """The results, or the error that explains best why there are none."""
        told = [told for told in map(self._error_of, range(self.ranks)) if told]
        if self.stalled:
            raise RankLost(self.stalled)
        if told:
            raise self._completed(min(told, key=_precedence)[1])
        if failure:
            raise RankLost(f"{failure}; last recorded: {self._last_words()}")
        files = [self.folder / f"{rank}.result" for rank in range(self.ranks)]
        return [pickle.loads(file.read_bytes()) for file in files]

    def _completed(self, error: StrettoError) -> StrettoError:
        """A wait that ended names no culprit if that one was waiting too, when it was last heard.

        Here it is known: the rank that left neither a result nor an error.
        """
        left = [file.stem for file in self.folder.iterdir() if file.suffix != ".note"]
        silent = [rank for rank in range(self.ranks) if str(rank) not in left]
        if not silent or not isinstance(error, MeshTimeout):
            return error
        return RankLost(f"{error}\n  lost: {self._last_words(silent)}")

    def _follow(self) -> None:
        last, failed, asked = time.monotonic(), None, None
        while not self._done.wait(_POLL_S):
            now = time.monotonic()
            if self._read():
                last = now
            # A rank's own waits time out first and know more; this is for when nobody is waiting.
            elif not self.stalled and now - last > self._patience_s:
                limit = self._patience_s
                why = f"{self._last_words()}{_server_words()}"
                self.stalled = f"no rank gave a sign within {limit:g} s: {why}"
            if failed is None and any(self.folder.glob("*.error")):
                failed = now
            # torchrun asks the others to end, and waits long for one that cannot hear it.
            if self.stalled or (failed is not None and now - failed > 2 * GRACE_S):
                self._end_all()
                asked = now if asked is None else asked
            # Ranks are its children: if it does not say that they ended, torchrun waits for ever.
            if asked is not None and now - asked > GRACE_S:
                _end_server()

    @property
    def _patience_s(self) -> float:
        """Seconds of silence that are a stall; the first sign waits for the server's imports."""
        asked = [note.get("patience_s", 0.0) for note in self.notes.values()]
        limit = max(self.timeout_s, *asked, 0.0) + GRACE_S
        has_begun = len(self.notes) == self.ranks
        return limit if has_begun or _is_stopped(_server()) else max(limit, START_S)

    def _read(self) -> bool:
        """Pick up new notes; whether there were any."""
        news = False
        for rank in range(self.ranks):
            with contextlib.suppress(FileNotFoundError):
                note = json.loads((self.folder / f"{rank}.note").read_text())
                if note != self.notes.get(rank):
                    self.notes[rank], news = note, True
                    if self.on_note:
                        self.on_note(rank, note)
        return news

    def _end_all(self) -> None:
        for note in self.notes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(note["pid"], signal.SIGKILL)

    def _last_words(self, ranks: Sequence[int] | None = None) -> str:
        words = []
        for rank in range(self.ranks) if ranks is None else ranks:
            note = self.notes.get(rank)
            if note is None:
                words.append(f"rank {rank} (recorded nothing)")
            else:
                ago = time.time() - note["time"]
                words.append(f"rank {rank} ({ago:.1f} s ago: {note['stage']})")
        return "; ".join(words)

    def _error_of(self, rank: int) -> tuple[float, StrettoError] | None:
        """When a rank raised, and what."""
        file = self.folder / f"{rank}.error"
        if not file.is_file():
            return None
        told = json.loads(file.read_text())
        kind = getattr(errors, told["kind"], None)
        if isinstance(kind, type) and issubclass(kind, StrettoError):
            error = kind(told["message"])
        else:
            error = LaunchError(
                f"rank {rank} raised {told['kind']}: {told['message']}\n{told['traceback']}"
            )
        error.add_note(f"in rank {rank}:\n{told['traceback']}")
        return told["time"], error


def _is_stopped(pid: int | None) -> bool:
    """Whether a signal holds a process; False where /proc does not tell."""
    with contextlib.suppress(OSError):
        # The name of a process may hold spaces and brackets; its state follows the last of them.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _server_words() -> str:
    """What a stopped server has to do with ranks that are late, "" if it runs."""
    server = _server()
    if not _is_stopped(server):
        return ""
    return (
        f"\n  why: process {server}, the server that ranks are forked from and that says when they "
        "end, was stopped by a signal\n"
        "  to fix: run it again, a new server is started"
    )


def _end_server() -> None:
    """End the server, and wait until it has, so that the next job does not ask it for ranks."""
    server = _server()
    if server is not None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(server, signal.SIGKILL)
            # The standard library collects it, and takes one that it cannot collect for a bug.
            os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)


def _precedence(told: tuple[float, StrettoError]) -> tuple[bool, float]:
    """Causes before their consequences at waiting peers, then the earliest."""
    at, error = told
    return isinstance(error, MeshTimeout), at


def _here(entry: Callable, args: tuple, threads: int, on_note: OnNote | None) -> Any:
    import torch

    def tell(stage: str, **more: Any) -> None:
        if on_note:
            on_note(0, {"stage": stage, **more})

    keep_freed()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return entry(tell, *args)
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet_launcher() -> Iterator[None]:
    """torchrun logs each failing rank with its traceback; here the error is raised instead."""
    importlib.import_module("torch.distributed.launcher.api")
    talkers = ("torch.distributed.elastic", "torch.multiprocessing")
    names = [name for name in logging.root.manager.loggerDict if name.startswith(talkers)]
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Inside, and in a process that is started inside, SIGINT waits until it is let through.

    The server would print a traceback of its imports. Not ignored, since its ranks would be too.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- a rank ----------------------------------------------------------------------------------


def _rank(job: _Job) -> None:
    """Body of a rank: run the entry, leave its result or error in the folder."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _end_soon_when_asked()
    sys.path[:] = job.path
    folder, rank = Path(job.folder), int(os.environ["RANK"])
    if sys.platform == "linux":
        # All ranks are on this machine, whose own name may resolve to nothing.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    keep_freed()
    torch.set_num_threads(job.threads)

    def tell(stage: str, **more: Any) -> None:
        note = {"pid": os.getpid(), "time": time.time(), "stage": stage, **more}
        _write(folder / f"{rank}.note", json.dumps(note).encode())

    tell("started")
    try:
        result = job.entry(tell, *job.args)
        _write(folder / f"{rank}.result", pickle.dumps(result))
        tell("done")
    except BaseException as error:  # noqa: BLE001 - everything crosses to the parent
        told = {"kind": type(error).__name__, "message": str(error), "time": time.time()}
        told["traceback"] = traceback.format_exc()
        _write(folder / f"{rank}.error", json.dumps(told).encode())
        # torchrun would print the traceback again, once per rank.
        os._exit(1)


def _end_soon_when_asked() -> None:
    """On SIGTERM leave GRACE_S seconds, then end, wherever the main thread is.

    torchrun sends it when a peer failed. Ending at once would lose what this rank has seen; a
    handler would wait for the main thread to come back from a collective.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def end() -> None:
        signal.sigwait({signal.SIGTERM})
        time.sleep(GRACE_S)
        os._exit(143)

    threading.Thread(target=end, name="end-when-asked", daemon=True).start()


def _write(file: Path, content: bytes) -> None:
    aside = file.with_suffix(f"{file.suffix}-aside")
    aside.write_bytes(content)
    aside.replace(file)
