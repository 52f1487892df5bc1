"""The process that times one network. Stands alone: stdlib, numpy, onnxruntime, Python >= 3.9.

Runs as `python latency_agent.py`, on this machine or copied to a board, and obeys JSON lines:

    {"do": "start", "kind": "onnx"}                      imports the runtime
    {"do": "open", "path", "inputs", "threads", "batch"} loads one network, runs it once
    {"do": "outputs", "batches"}                         logits of the first, or all; their sha256
    {"do": "warm", "least", "seconds"}                   runs until steady
    {"do": "run", "runs", "least", "seconds"}            the timed block: raw nanoseconds
    {"do": "close"}                                      drops the network; "open" may follow

Each answer is one line {"did": ..., ...}. Standard output carries nothing else: whatever the
libraries print goes to standard error. The process ends when its standard input does, even in the
middle of a hung inference, so it never outlives who started it. A failure is a traceback on
standard error and a non-zero exit; judging the figures is the driver's work (`latency.py`).

What is timed is `session.run` alone (perf_counter_ns on either side), at the batch the graph
fixes, else the one asked for, over rotating inputs. ONNX: CPU provider, all optimisations,
sequential, inter 1, intra = threads; everything else, spinning included, as onnxruntime ships it.
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

    def open(self, path: str, inputs: str, threads: int, batch: int = 1) -> dict[str, Any]:
        _forget_peak_rss()
        samples = np.load(inputs, allow_pickle=False)
        begin = time.perf_counter_ns()
        opener = _open_onnx if self.kind == "onnx" else _open_torch
        opened = opener(path, samples, threads, batch)
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

    def outputs(self, batches: Optional[int] = None) -> dict[str, Any]:  # noqa: UP045
        opened = self._network()
        feeds = opened.feeds[:batches]
        batches_of_logits = [np.asarray(opened.call(feed), dtype=np.float32) for feed in feeds]
        logits = np.ascontiguousarray(np.concatenate(batches_of_logits)[: opened.samples])
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

    def run(self, runs: int, least: int, seconds: float) -> dict[str, Any]:
        """Up to `runs` timed runs, `least` in any case, none begun after `seconds`."""
        self._timed(LEAD_IN_RUNS, seconds=LEAD_IN_SECONDS)
        cpu = time.process_time()
        durations = self._timed(runs, least=least, seconds=seconds)
        cpu = time.process_time() - cpu
        return {
            "durations_ns": durations,
            "cpu_seconds": cpu,
            "peak_rss_bytes": _peak_rss_bytes(),
            **_wait_until_quiet(),
        }

    def close(self) -> dict[str, Any]:
        self.opened = None
        gc.collect()  # a session is freed, with its threads, before the next one is loaded
        return {}

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


def _open_onnx(path: str, inputs: np.ndarray, threads: int, batch: int) -> Opened:
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    begin = time.perf_counter_ns()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    load_ns = time.perf_counter_ns() - begin
    entries = session.get_inputs()
    entry = entries[0]
    batch = entry.shape[0] if isinstance(entry.shape[0], int) else batch
    names = [one.name for one in entries]
    feeds = [_feed(batch_of_inputs, names) for batch_of_inputs in _batches(inputs, batch)]
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
            "spinning": "default (on)",
        },
    }
    return Opened(call, feeds, len(inputs), facts)


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


def _batches(inputs: np.ndarray, batch: int) -> list[np.ndarray]:
    """All inputs in batches of `batch`; the last one is filled up from the first ones."""
    starts = range(0, len(inputs), batch)
    rows = [[(start + k) % len(inputs) for k in range(batch)] for start in starts]
    return [np.ascontiguousarray(inputs[row]) for row in rows]


def _feed(batch: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """One input takes it whole; of several (ids and mask of texts) each takes its row."""
    if len(names) == 1:
        return {names[0]: batch}
    return {name: np.ascontiguousarray(batch[:, row]) for row, name in enumerate(names)}


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


def _forget_peak_rss() -> None:
    """Starts the peak afresh, so that a network does not inherit that of the one before."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # proc(5): reset the peak resident set size
    except OSError:
        pass  # not Linux, or read-only /proc: the peak then covers the whole process's life


def _peak_rss_bytes() -> int:
    """Peak resident memory. Not from getrusage on Linux: that survives exec, so it would hold
    the peak of a large parent."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
