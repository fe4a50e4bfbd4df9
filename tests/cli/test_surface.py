"""Commands and their flags, frozen: a new one is a decision, made here and in the docs."""

from stretto.cli.app import COMMANDS, build

SURFACE = {
    "bench attention": {"--json", "--out", "--quick", "-o"},
    "bench exactness": {"--json", "--only", "--out", "--ranks", "-o"},
    "bench families": {"--json", "--only", "--out", "--ranks", "-o"},
    "bench links": {"--json", "--layouts", "--out", "--quick", "--rate", "--repeats", "-o"},
    "bench steps": {"--json", "--out", "--quick", "--repeats", "-o"},
    "bench train": {"--json", "--out", "--quick", "-o"},
    "doctor": {"--json"},
    "explain": {
        "--cluster",
        "--diff",
        "--dtype",
        "--guided-bytes",
        "--json",
        "--model",
        "--plan",
        "--ranks",
        "--sequences",
        "--shift",
        "--steps",
        "--tokens",
        "--window",
        "--workload",
    },
    "generate": {
        "--cfg",
        "--classes",
        "--compare",
        "--denoiser",
        "--depth",
        "--device",
        "--dtype",
        "--emulate",
        "--guidance-scale",
        "--json",
        "--out",
        "--plan",
        "--predictor",
        "--prompt",
        "--quiet",
        "--ranks",
        "--repeats",
        "--seed",
        "--set",
        "--step",
        "--steps",
        "--threads",
        "--timeout",
        "--windows",
        "-o",
        "FOLDER",
    },
    "generate calibrate": {
        "--calls",
        "--classes",
        "--degree",
        "--depth",
        "--guidance-scale",
        "--holdout",
        "--json",
        "--out",
        "--prompt",
        "--seed",
        "--steps",
        "--threads",
        "-o",
        "FOLDER",
    },
    "plan train": {
        "--cluster",
        "--dtype",
        "--json",
        "--out",
        "--ranks",
        "--sequences",
        "--tokens",
        "--top",
        "--window",
        "--workload",
        "-o",
        "MODEL",
    },
    "probe": {"--force", "--json", "--out", "--ranks", "-o"},
    "train": {
        "--clip",
        "--cluster",
        "--compare",
        "--cp",
        "--data",
        "--device",
        "--documents",
        "--dtype",
        "--fsdp",
        "--json",
        "--micro-batch",
        "--optimizer",
        "--out",
        "--plan",
        "--quiet",
        "--ranks",
        "--rate",
        "--recompute",
        "--resume",
        "--save-every",
        "--seed",
        "--sequences",
        "--steps",
        "--threads",
        "--timeout",
        "--tokens",
        "--validate-every",
        "--warmup",
        "--weight-decay",
        "--window",
        "-o",
        "MODEL",
    },
}


def flags(app):
    """Names of all parameters of a command, positional ones by their upper-case name."""
    collection = app.assemble_argument_collection(default_parameter=build().default_parameter)
    # A star stands for a group of parameters, each of which is listed as well.
    return {name for argument in collection for name in argument.names} - {"*"}


def commands(app, prefix=""):
    """Every command below an app by its full name; apps without a command of their own too."""
    for name in app:
        if name.startswith("-"):
            continue
        yield (prefix + name, app[name])
        yield from commands(app[name], prefix + name + " ")


def test_surface_is_frozen():
    found = {name: flags(app) for name, app in commands(build()) if app.default_command}
    assert found == SURFACE


def test_every_command_speaks_json():
    assert [name for name, names in SURFACE.items() if "--json" not in names] == []


def test_every_command_of_the_table_has_a_line():
    for target, line in COMMANDS.values():
        assert target.startswith("stretto.cli.")
        assert line.endswith(".")
