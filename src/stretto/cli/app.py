"""The `stretto` command: a table of commands, each imported only when called.

Exit codes: 0 done; 1 a failed check or a bug (with traceback); 2 an error of the tree or a
command line that does not parse, or no room to write; 130 interrupted by Ctrl-C;
141 the reader of the output has closed it.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

import stretto
from stretto.errors import StrettoError

#: name -> (where it lives, its line in `stretto --help`). A line stands here, and not in the
#: command's docstring, so that help imports no command and so no torch.
COMMANDS = {
    "bench": (
        "stretto.cli.bench:app",
        "Measure: exactness of every pipeline, speed and fidelity of ranks.",
    ),
    "doctor": ("stretto.cli.doctor:doctor", "What works on this machine, and what to install."),
    "explain": ("stretto.cli.explain:explain", "Time, bytes and limits of a plan."),
    "generate": (
        "stretto.cli.generate:app",
        "Generate pictures, video or sound on several ranks.",
    ),
    "plan": ("stretto.cli.plan:app", "Find the plan for a job on a cluster."),
    "probe": ("stretto.cli.probe:probe", "Measure devices and links into a cluster file."),
    "train": (
        "stretto.cli.train:app",
        "Train a model on long sequences over several ranks.",
    ),
}
#: What a write says where there is no room.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build() -> App:
    """The command tree; commands stay unimported until one is called."""
    app = App(
        name="stretto",
        help="Make a large model run well on the devices at hand.",
        version=stretto.__version__,
        default_parameter=Parameter(negative=()),
        suppress_keyboard_interrupt=False,
    )
    for name, (target, line) in COMMANDS.items():
        app.command(target, name=name, help=line)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default) and return its exit code."""
    app = build()
    try:
        code = app(
            None if argv is None else list(argv),
            exit_on_error=False,
            result_action="return_int_as_exit_code_else_zero",
        )
        if sys.stdout:
            sys.stdout.flush()
        return code
    except CycloptsError:  # already printed by cyclopts, with the nearest valid name
        return 2
    except StrettoError as error:
        _print_error(error)
        return 2
    except BrokenPipeError:
        if not _is_output_closed():
            raise
        return 141
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _turn_away(sys.stdout.fileno())
        where = f" {error.filename}" if error.filename else ""
        print(f"cannot write{where}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        from stretto.mesh.launch import abandon  # a clean run never needs it

        abandon()
        print("interrupted", file=sys.stderr)
        return 130


def _is_output_closed() -> bool:
    """Whether nobody reads on (`stretto doctor | head -1`); what is left then goes nowhere.

    Pipes between ranks break too: the output is asked itself.
    """
    output = sys.stdout.fileno()
    asked = select.poll()
    asked.register(output, 0)
    is_closed = bool(asked.poll(0))  # errors and hang-ups alone are told unasked
    if is_closed:
        _turn_away(output)
    return is_closed


def _turn_away(output: int) -> None:
    """Python flushes once more at its end, and would say that it could not."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)


def _print_error(error: StrettoError) -> None:
    from rich.console import Console  # a clean run never needs it
    from rich.text import Text

    # Text, not markup: messages hold brackets such as mesh["step"].
    Console(stderr=True, soft_wrap=True).print(
        Text.assemble((type(error).__name__, "bold red"), (f": {error}", "red"))
    )


if __name__ == "__main__":
    sys.exit(main())
