"""One tree of errors, each with its exit code.

    EdgestillError                 70   never raised itself
    ├── UserError                   2   anything the user supplied
    │   ├── UsageError              2   the command line
    │   ├── RecipeError             2   the recipe or a policy file
    │   ├── DataError               2   images, labels, splits
    │   ├── ModelError              2   a network that cannot be built or run
    │   ├── WeightsError            2   a checkpoint that does not fit
    │   ├── ExportError             2   an operator or graph that cannot be exported or quantized
    │   └── OutputError             2   a folder that cannot be written, a full disk, a held lock
    ├── MeasurementError            4   a measurement that proves nothing (NaN, no samples)
    ├── RuntimeFailure              5   a device, child process or runtime that died
    └── IntegrityError              6   files that are not what the manifest says
    Interrupted                   130   Ctrl-C; what is done is kept

A failed or inconclusive gate (1, 3) is a result, not an error. A bug of ours has no class here: it
keeps its traceback and exits 70. This module imports nothing, so `models` and `exporters` may
raise these errors too although they stand below `pipeline`.

Every message says where, what was expected, what came, and what to do.
"""

from __future__ import annotations


class EdgestillError(Exception):
    """Root of the tree. `exit_code` is what the command returns."""

    exit_code = 70


class UserError(EdgestillError):
    """Something the user supplied cannot be used."""

    exit_code = 2


class UsageError(UserError):
    """The command line asks for something that does not exist or does not fit together."""


class RecipeError(UserError):
    """The recipe, an override or a policy is wrong. Carries every problem found, one a line."""


class DataError(UserError):
    """Images, labels or splits that cannot be used."""


class ModelError(UserError):
    """A network that cannot be found, built or run."""


class WeightsError(UserError):
    """A checkpoint that cannot be read or does not fit its network."""


class ExportError(UserError):
    """A graph that cannot be exported, simplified or quantized."""


class OutputError(UserError):
    """The output folder cannot be written, is full, or is in use."""


class MeasurementError(EdgestillError):
    """A measurement that proves nothing: NaN, no samples, nothing compared."""

    exit_code = 4


class RuntimeFailure(EdgestillError):
    """A device, child process or runtime that died."""

    exit_code = 5


class IntegrityError(EdgestillError):
    """Files that are not what their manifest or header says."""

    exit_code = 6


class Interrupted(EdgestillError):
    """Ctrl-C. Everything committed so far is kept."""

    exit_code = 130
