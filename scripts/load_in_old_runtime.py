"""Load and run ONNX files with whatever onnxruntime is installed; numpy and onnxruntime alone.

Run by scripts/wheel_check in an environment that holds the oldest runtime a file promises.
"""

import sys

import numpy as np
import onnxruntime as ort

for path in sys.argv[1:]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 2 for size in given.shape]
    (logits,) = session.run(None, {given.name: np.zeros(shape, np.float32)})
    assert np.isfinite(logits).all(), path
    print(f"{path}: runs in onnxruntime {ort.__version__}, output {logits.shape}")
