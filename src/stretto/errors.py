"""Every exception of stretto, one sentence each.

A message says what is wrong with the numbers in it, why, and what to change. The command line
turns any `StrettoError` into exit code 2 without a traceback.
"""

from __future__ import annotations


class StrettoError(Exception):
    """Root of the tree: anything a user, a machine or a peer can cause."""


class ConfigError(StrettoError, ValueError):
    """A value, name or file that cannot be used as given."""


class PlanMismatch(ConfigError):
    """A plan that does not fit the ranks, the model, the scheduler or the number of steps."""


class UnsupportedModel(ConfigError, NotImplementedError):
    """A model or attention call that cannot be split exactly, with the reason and a way out."""


class Infeasible(PlanMismatch):
    """A plan that needs more memory than its devices have; the message says by how much."""


class ShapeError(ConfigError):
    """Tensors, lengths or masks that do not fit together; the message shows both sides."""


class UnsupportedPipeline(ConfigError):
    """A pipeline that cannot be parallelized as asked, with the reason and the way out."""


class SplitMismatch(UnsupportedPipeline):
    """A denoiser whose batch cannot be cut into the chunks that the plan asks for."""


class LatentsEdited(UnsupportedPipeline):
    """A pipeline that changed its latents between two scheduler steps in the replay walk."""


class MissingDependency(ConfigError):
    """A library that this feature needs and this environment lacks or has in a broken state."""


class RunError(StrettoError, RuntimeError):
    """Something that went wrong while ranks were at work."""


class HookDisplaced(RunError):
    """Somebody replaced a hooked method, so calls no longer pass through stretto."""


class IncompleteWindow(RunError):
    """A pipeline call ended, or skipped a step, inside a window of parallel steps."""


class NonFinite(RunError):
    """A denoiser returned NaN or infinity."""


class RanksDisagree(RunError):
    """Ranks that must hold equal values do not."""


class MeshTimeout(RunError):
    """A collective did not finish before its deadline."""


class RankLost(MeshTimeout):
    """A peer died, raised or stalled; the message names it and what it last recorded."""


class LaunchError(RunError):
    """A rank started by stretto ended with an error; the message carries its traceback."""
