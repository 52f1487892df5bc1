"""The process that times one network. Stands alone: stdlib, numpy, onnxruntime, Python >= 3.9,
and the files of `BOARD_FILES` (agent_process.py) beside it.

Runs as `python latency_agent.py`, on this machine or copied to a board, and obeys JSON lines:

    {"do": "start", "kind": "onnx"}                      imports the runtime
    {"do": "condition"}                                  how the machine is now (condition.py)
    {"do": "open", "path", "inputs", "threads", "batch"} loads one network, runs it once
    {"do": "outputs", "start", "batches"}                logits of these, or all; their sha256
    {"do": "warm", "least", "seconds"}                   runs until steady
    {"do": "run", "runs", "least", "seconds", "rate_hz"} the timed block: raw nanoseconds
    {"do": "close"}                                      drops the network; "open" may follow

`open` also takes "sha256" (what the copies on this machine must be, looked at before they are
loaded), "cold" (the file's pages leave the page cache first), "spinning" and "affinity".

Each answer is one line {"did": ..., ...}. Standard output carries nothing else: whatever the
libraries print goes to standard error. The process ends when its standard input does, even in the
middle of a hung inference, so it never outlives who started it. A failure is a traceback on
standard error and a non-zero exit; judging the figures is the driver's work (`latency.py`).

What is timed is `session.run` alone (perf_counter_ns on either side), at the batch the graph
fixes, else the one asked for, over rotating inputs: an .npy, or an .npz with an array for each of
the model's inputs. ONNX: CPU provider, all optimisations, sequential, inter 1, intra = threads;
everything else, spinning included, as onnxruntime ships it.
Torch rows need the installed edgestill to rebuild a stored network: eval, inference_mode,
contiguous NCHW, torch.set_num_threads(threads).

Before it answers a block it waits until its own threads have stopped spinning, so that an idle
process costs the next one nothing. onnxruntime's workers spin on after a run: 36 ms on a 2-core
Xeon, over a second reported on slower machines, hence waiting for the fact and not for a time.
"""

from __future__ import annotations

import base64
import gc
import hashlib
import importlib
import json
import os
import platform
import queue
import signal
import statistics
import sys
import threading
import time
import types
from typing import Any, Callable, NamedTuple, Optional  # noqa: UP035  # 3.9: run time

import numpy as np

STEADY = 0.02  # two windows' medians within 2 % of each other
WINDOW_RUNS = 5  # a window has this many runs at least, so that warming takes 10 or more
WINDOW_SECONDS = 0.02  # and lasts this at least: medians of a few microseconds would agree by luck
LEAD_IN_RUNS = 3  # untimed, at the head of a block: caches and clock come back after idling
LEAD_IN_SECONDS = 0.1  # a run that takes this long has brought them back by itself
QUIET_STEP_SECONDS = 0.005
QUIET_SHARE = 0.2  # of one CPU; a spinning thread takes all of it, a sleeping one 0.6 %
QUIET_CAP_SECONDS = 10.0


class Opened(NamedTuple):
    """A network ready to run. `call(feed)` is what is timed; it returns the logits."""

    call: Callable[[Any], Any]
    feeds: list[Any]
    samples: int  # in all feeds, without the repeated ones that fill the last batch
    facts: dict[str, Any]


class Agent:
    """What lives between two commands. One method a command."""

    def __init__(self) -> None:
        self.kind = ""
        self.opened: Optional[Opened] = None  # noqa: UP045  # 3.9: X | Y is new in 3.10
        self.turn = 0  # next feed: rotates on over blocks
        self.cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

    def start(self, kind: str) -> dict[str, Any]:
        self.kind = kind
        name = {"onnx": "onnxruntime", "torch": "torch"}[kind]
        library = importlib.import_module(name)
        if kind == "torch":
            importlib.import_module("edgestill.models.store")  # so that opening does not pay for it
        return {
            "runtime": name,
            "runtime_version": library.__version__,
            "python": platform.python_version(),
            "pid": os.getpid(),
        }

    def condition(self) -> dict[str, Any]:
        return dict(sibling("condition").condition())

    def open(
        self,
        path: str,
        inputs: str,
        threads: int,
        batch: int = 1,
        sha256: Optional[dict[str, str]] = None,  # noqa: UP045
        cold: bool = False,
        spinning: Optional[bool] = None,  # noqa: UP045  # None: as the runtime ships it
        affinity: Optional[list[int]] = None,  # noqa: UP045  # of all its threads
    ) -> dict[str, Any]:
        resources = sibling("resources")
        for copied, expected in (sha256 or {}).items():
            resources.check_sha256(copied, expected)
        if cold:
            resources.drop_pages(path)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, affinity or self.cpus)
        resources.forget_peak_rss()
        samples = np.load(inputs, allow_pickle=False)
        if isinstance(samples, np.lib.npyio.NpzFile):
            samples = {name: samples[name] for name in samples.files}
        begin = time.perf_counter_ns()
        if self.kind == "onnx":
            opened = _open_onnx(path, samples, threads, batch, spinning)
        else:
            opened = _open_torch(path, samples, threads, batch)
        loaded = time.perf_counter_ns()
        opened.call(opened.feeds[0])
        ran = time.perf_counter_ns()
        self.opened, self.turn = opened, 0
        return {
            "load_ns": opened.facts.pop("load_ns", loaded - begin),
            "first_ns": ran - loaded,
            **opened.facts,
            **_wait_until_quiet(),
        }

    def outputs(
        self,
        start: int = 0,
        batches: Optional[int] = None,  # noqa: UP045  # None: all that follow
    ) -> dict[str, Any]:
        opened = self._network()
        feeds = opened.feeds[start:][:batches]
        batches_of_logits = [np.asarray(opened.call(feed), dtype=np.float32) for feed in feeds]
        left = opened.samples - start * opened.facts["batch"]
        logits = np.ascontiguousarray(np.concatenate(batches_of_logits)[:left])
        raw = logits.astype("<f4").tobytes()
        return {
            "shape": list(logits.shape),
            "logits": base64.b64encode(raw).decode("ascii"),
            "sha256": hashlib.sha256(raw).hexdigest(),
            **_wait_until_quiet(),
        }

    def warm(self, seconds: float) -> dict[str, Any]:
        """Windows of runs, until two in a row agree or `seconds` are over; two at least."""
        begin = time.perf_counter()
        runs, steady, before = 0, False, float("inf")
        while not steady and (runs < 2 * WINDOW_RUNS or time.perf_counter() - begin < seconds):
            window = self._timed(sys.maxsize, least=WINDOW_RUNS, seconds=WINDOW_SECONDS)
            middle = statistics.median(window)
            steady = abs(middle - before) <= STEADY * middle
            runs, before = runs + len(window), middle
        taken = time.perf_counter() - begin
        return {"runs": runs, "steady": steady, "seconds": taken, **_wait_until_quiet()}

    def run(
        self,
        runs: int,
        least: int,
        seconds: float,
        rate_hz: Optional[float] = None,  # noqa: UP045  # None: back to back
    ) -> dict[str, Any]:
        """Up to `runs` timed runs, `least` in any case, none begun after `seconds`."""
        self._timed(LEAD_IN_RUNS, seconds=LEAD_IN_SECONDS)
        cpu = time.process_time()
        if rate_hz is None:
            durations = self._timed(runs, least=least, seconds=seconds)
        else:
            durations = self._paced(runs, least, seconds, rate_hz)
        cpu = time.process_time() - cpu
        return {
            "durations_ns": durations,
            "cpu_seconds": cpu,
            "peak_rss_bytes": sibling("resources").peak_rss_bytes(),
            **_wait_until_quiet(),
        }

    def close(self) -> dict[str, Any]:
        self.opened = None
        gc.collect()  # a session is freed, with its threads, before the next one is loaded
        return {}

    def _paced(self, runs: int, least: int, seconds: float, rate_hz: float) -> list[int]:
        """As `_timed`, each call begun 1 / rate_hz after the one before: it sleeps in between."""
        begin = time.perf_counter()
        durations: list[int] = []
        while len(durations) < runs:
            due = begin + len(durations) / rate_hz
            if due - begin > seconds and len(durations) >= least:
                break
            time.sleep(max(0.0, due - time.perf_counter()))
            durations += self._timed(1)
        return durations

    def _network(self) -> Opened:
        if self.opened is None:
            raise RuntimeError("no network is open: send open first")
        return self.opened

    def _timed(self, runs: int, least: int = 1, seconds: float = float("inf")) -> list[int]:
        """Nanoseconds of each call, and of nothing but the call."""
        opened = self._network()
        call, feeds, clock = opened.call, opened.feeds, time.perf_counter_ns
        durations: list[int] = []
        deadline = clock() + seconds * 1e9
        gc.disable()
        try:
            for index in range(self.turn, self.turn + runs):
                feed = feeds[index % len(feeds)]
                begin = clock()
                call(feed)
                end = clock()
                durations.append(end - begin)
                if end >= deadline and len(durations) >= least:
                    break
        finally:
            gc.enable()
        self.turn = (self.turn + len(durations)) % len(feeds)
        return durations


def _open_onnx(
    path: str,
    inputs: Any,
    threads: int,
    batch: int,
    spinning: Optional[bool],  # noqa: UP045
) -> Opened:
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if spinning is not None:
        value = "1" if spinning else "0"
        options.add_session_config_entry("session.intra_op.allow_spinning", value)
    begin = time.perf_counter_ns()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    load_ns = time.perf_counter_ns() - begin
    entries = session.get_inputs()
    entry = entries[0]
    batch = entry.shape[0] if isinstance(entry.shape[0], int) else batch
    names = [one.name for one in entries]
    tokens = entry.shape[1] if len(entry.shape) == 2 else None
    feeds = [_feed(one, names, tokens) for one in _batches(inputs, batch)]
    outputs = [session.get_outputs()[0].name]

    def call(feed: Any) -> Any:
        return session.run(outputs, feed)[0]

    facts = {
        "load_ns": load_ns,
        "batch": batch,
        "input_shape": [dim if isinstance(dim, int) else None for dim in entry.shape],
        "settings": {
            "providers": session.get_providers(),
            "intra_threads": threads,
            "inter_threads": 1,
            "execution": "sequential",
            "optimization": "all",
            "spinning": "default (on)" if spinning is None else "on" if spinning else "off",
        },
    }
    return Opened(call, feeds, _count(inputs), facts)


def _open_torch(path: str, inputs: np.ndarray, threads: int, batch: int) -> Opened:
    torch = importlib.import_module("torch")
    store = importlib.import_module("edgestill.models.store")
    path_type = importlib.import_module("pathlib").Path
    torch.set_num_threads(threads)
    begin = time.perf_counter_ns()
    network = store.load_network(path_type(path)).network
    load_ns = time.perf_counter_ns() - begin
    module = network.module
    if network.trainable:  # an exported program has its mode baked in and refuses eval()
        module.eval()
    batch = getattr(network, "fixed_batch", None) or batch  # an exported program may fix its own
    feeds = [torch.from_numpy(batch_of_inputs) for batch_of_inputs in _batches(inputs, batch)]

    def call(feed: Any) -> Any:
        with torch.inference_mode():
            return module(feed)

    facts = {
        "load_ns": load_ns,
        "batch": batch,
        "input_shape": [None, *inputs.shape[1:]],
        "settings": {
            "intra_threads": threads,
            "mode": "inference_mode, eager, contiguous",
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        },
    }
    return Opened(call, feeds, len(inputs), facts)


def _count(inputs: Any) -> int:
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)


def _batches(inputs: Any, batch: int) -> list[Any]:
    """All inputs in batches of `batch`; the last one is filled up from the first ones."""
    count = _count(inputs)
    starts = range(0, count, batch)
    rows = [[(start + k) % count for k in range(batch)] for start in starts]
    if isinstance(inputs, dict):
        return [{n: np.ascontiguousarray(one[row]) for n, one in inputs.items()} for row in rows]
    return [np.ascontiguousarray(inputs[row]) for row in rows]


def _feed(batch: Any, names: list[str], tokens: Any) -> dict[str, np.ndarray]:
    """By name where they have names; else one input takes it whole, and of several (ids and mask
    of texts) each takes its row, as long as the graph fixes, else as the longest text."""
    if isinstance(batch, dict):
        return batch
    if len(names) == 1:
        return {names[0]: batch}
    longest = _longest(batch)
    size = tokens if isinstance(tokens, int) else longest
    if longest > size:
        raise ValueError(f"the graph takes texts of {size} tokens, and one has {longest}")
    padded = np.pad(batch, ((0, 0), (0, 0), (0, max(0, size - batch.shape[2]))))[..., :size]
    return {name: np.ascontiguousarray(padded[:, row]) for row, name in enumerate(names)}


def _longest(tokens: np.ndarray) -> int:
    """Up to the last one that the mask, the second row, shows in any text."""
    used = np.flatnonzero(tokens[:, 1].any(axis=0))
    return int(used[-1]) + 1 if len(used) else 1


def sibling(name: str) -> Any:
    """A module that lies beside this file, wherever that is: here, or copied to a board."""
    package = types.ModuleType("measure")
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules.setdefault("measure", package)
    return importlib.import_module(f"measure.{name}")


def _wait_until_quiet() -> dict[str, Any]:
    """Sleeps until this process's threads use next to no CPU; says whether that came to be."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < QUIET_CAP_SECONDS:
        cpu, wall = time.process_time(), time.perf_counter()
        time.sleep(QUIET_STEP_SECONDS)
        wall = time.perf_counter() - wall
        if time.process_time() - cpu < QUIET_SHARE * wall:
            return {"quiet": True, "quiet_seconds": time.perf_counter() - begin}
    return {"quiet": False, "quiet_seconds": time.perf_counter() - begin}


def _listen(commands: queue.Queue[bytes]) -> None:
    """Hands on each line; the end of the stream ends the process, whatever it is doing."""
    # unbuffered: a buffered reader's lock, held here, would abort the interpreter's shutdown
    with os.fdopen(0, "rb", buffering=0, closefd=False) as stream:
        for line in stream:
            commands.put(line)
    os._exit(0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # from here on, prints of libraries, C code included, go to standard error
    commands: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    agent = Agent()
    methods: dict[str, Callable[..., dict[str, Any]]] = {
        "start": agent.start,
        "condition": agent.condition,
        "open": agent.open,
        "outputs": agent.outputs,
        "warm": agent.warm,
        "run": agent.run,
        "close": agent.close,
    }
    while True:
        command = json.loads(commands.get())
        did = command.pop("do")
        answer = {"did": did, **methods[did](**command)}
        answers.write(json.dumps(answer).encode("ascii") + b"\n")


if __name__ == "__main__":
    main()
