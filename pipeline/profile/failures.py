"""What the death of a measuring process means, in words that say what to do. Pure.

Exit codes here are as Python gives them: a negative one is a signal. A shell on a board gives 128
plus the signal, and ssh 255 for its own failures.
"""

from __future__ import annotations

import re

from ..measure.agent_process import explain_exit

SSH_FAILED = 255
NOT_EXECUTABLE, NOT_FOUND = 126, 127
SHELL_SIGNAL = 128

# (what the words say, what to do), the first that fits. {host}: as ssh knows the device.
SSH_WORDS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is another one than before: somebody may be in between, or it was set up "
        "anew. Find out which; then `ssh-keygen -R` its address and log in once by hand",
    ),
    (
        r"[Hh]ost key (is )?(known|verification failed)|No .* host key is known",
        "its host key is not known here: log in once by hand with `ssh {host}` and compare the "
        "fingerprint",
    ),
    (
        r"Permission denied",
        "it does not let this user in without a password: put a key there with `ssh-copy-id "
        "{host}`, or load yours with `ssh-add`",
    ),
    (
        r"Could not resolve hostname",
        "no such host: write an address that `ssh {host}` reaches into devices.yaml, or the alias "
        "into ~/.ssh/config",
    ),
    (
        r"Bad configuration option|Can't open user config file|terminating, \d+ bad config",
        "ssh does not read its configuration: correct it",
    ),
    (
        r"timed out|Connection refused|No route to host|Network is unreachable",
        "it does not answer: is it switched on, in this network, and does sshd run there?",
    ),
)
AGENT_WORDS = (
    (
        r"No module named '?(numpy|onnxruntime)",
        "{python} on {device} has no {0}: `{python} -m pip install numpy onnxruntime` there, or "
        "name another interpreter with python: in devices.yaml",
    ),
    (
        r"No space left on device|[Dd]isk quota exceeded",
        "{device} has no room for the model and its inputs: free some in its temporary folder, or "
        "point TMPDIR elsewhere",
    ),
    (
        r"[Ee]xec format error|wrong ELF class|cannot execute binary file",
        "{python} on {device} is for another kind of CPU: name the right one with python: in "
        "devices.yaml",
    ),
    (
        r"(Unsupported model IR version|is under development|onnx opset version)",
        "the model is newer than {device}'s onnxruntime: update that, or export again with an "
        "older export.min_runtime",
    ),
    (
        r"MemoryError|bad_alloc|[Cc]annot allocate memory",
        "{device} has too little memory for it: free some, or take a smaller network",
    ),
    (
        r"SyntaxError|requires a different Python",
        "{python} on {device} is older than 3.9: name a newer one with python: in devices.yaml",
    ),
)  # fmt: skip
MISSING_PYTHON = (
    "{device} has no program {python}: install Python 3.9 or newer there, name it with python: in "
    "devices.yaml, or name onnxruntime's own program with perf_test:"
)


def explain_death(code: int, words: str, *, runtime: str, device: str, python: str) -> str:
    """Of a process on a machine that is not this one.

    Args:
        code: of the process that stood for it here. words: what came on standard error.
    """
    facts = {"device": device, "python": python}
    known = first_fitting(AGENT_WORDS, words, **facts)
    if known is not None:
        return known
    if code == NOT_FOUND:
        return MISSING_PYTHON.format(**facts)
    if code == NOT_EXECUTABLE:
        return f"{python} on {device} cannot be executed: check python: in devices.yaml"
    if code > SHELL_SIGNAL and code != SSH_FAILED:
        return explain_exit(SHELL_SIGNAL - code, runtime=runtime)
    return explain_exit(code, runtime=runtime)


def explain_ssh(words: str, *, host: str) -> str:
    """Of a connection that did not come to be, or broke."""
    found = first_fitting(SSH_WORDS, words, host=host)
    return found or "the connection broke: nothing of this measurement counts; try again"


def first_fitting(table: tuple[tuple[str, str], ...], words: str, **facts: str) -> str | None:
    """The advice of the first pattern found in `words`; {0} in it is what the pattern's group
    found."""
    for pattern, advice in table:
        match = re.search(pattern, words)
        if match is not None:
            return advice.format(*match.groups(""), **facts)
    return None
