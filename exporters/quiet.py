"""Keeps other libraries' talk off the terminal while they work for us.

torch's exporter, onnxscript and onnxruntime.quantization log, warn and print. What goes wrong comes
back as an exception; what they warn about is judged by checks and by parity on real samples.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log records, warnings or prints inside; everything as before afterwards.

    Acts on the whole process, so other threads are silenced too; output through a stream they
    already hold (rich keeps its own) goes on.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
