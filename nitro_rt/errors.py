"""The errors of nitro-rt.

    NitroError                  what a caller can cause or mend; the CLI prints it in one line and exits with 1
    ├── ConfigError             an option, recipe or argument is wrong (also a ValueError)
    ├── ModelNotFound           a checkpoint, bundle or file is not where it was looked for
    ├── ExportError             a checkpoint cannot be turned into graphs, or the graphs differ from it
    ├── BuildError              an engine cannot be built or published
    ├── BundleError             a bundle is damaged, edited, or of another version
    ├── EngineMismatch          an engine exists, but not for this machine, runtime, steps, size or batch
    ├── BackendUnavailable      the library or device that a backend needs is not here
    ├── ShapeError              an array has another shape, dtype or name than the engine's
    ├── DeviceLost              the GPU failed, and with it everything on it
    ├── CaptureError            a CUDA graph could not be captured or no longer fits
    ├── PipelineClosed          a pipeline was asked for an image after close(), or closed before it drew one
    ├── QueueFull               as many requests wait as the queue takes
    ├── DeadlineExceeded        a request's time ran out before it was drawn (also a TimeoutError)
    └── TrainingError           a run cannot start, resume or go on

Every message says what was asked, what was found, what is available and what to do next.
"""

from __future__ import annotations


class NitroError(Exception):
    """The root of all errors that nitro-rt raises on purpose."""


class ConfigError(NitroError, ValueError):
    """An option, recipe or argument is wrong."""


class ModelNotFound(NitroError):
    """A checkpoint, bundle or file is not where it was looked for."""


class ExportError(NitroError):
    """A checkpoint cannot be turned into graphs, or the graphs differ from it."""


class BuildError(NitroError):
    """An engine cannot be built or published."""


class BundleError(NitroError):
    """A bundle is damaged, edited, or of another version."""


class EngineMismatch(NitroError):
    """An engine exists, but not for this machine, runtime, number of steps, size or batch."""


class BackendUnavailable(NitroError):
    """The library or device that a backend needs is not here."""


class ShapeError(NitroError):
    """An array has another shape, dtype or name than the engine expects."""


class DeviceLost(NitroError):
    """The GPU failed in the middle of work; its CUDA context, engines and memory are gone."""


class CaptureError(NitroError):
    """A CUDA graph could not be captured or no longer fits its bindings."""


class PipelineClosed(NitroError):
    """A pipeline was asked for an image after `close`, or was closed before it drew one that waited."""


class QueueFull(NitroError):
    """As many requests wait as the pipeline's queue takes."""


class DeadlineExceeded(NitroError, TimeoutError):
    """A request's deadline passed before drawing began."""


class TrainingError(NitroError):
    """A training run cannot start, resume or go on."""
