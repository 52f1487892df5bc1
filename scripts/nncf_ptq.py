"""int8 by NNCF's defaults, for `bench_int8_files.py`. Stands alone: nncf, onnx, numpy.

python nncf_ptq.py FLOAT.onnx INPUTS.npy INT8.onnx
"""

from __future__ import annotations

import json
import sys
import time

import nncf
import numpy as np
import onnx


def main() -> None:
    source, inputs_path, target = sys.argv[1:]
    model = onnx.load(source)
    names = [value.name for value in model.graph.input]
    inputs = np.load(inputs_path, allow_pickle=False)
    begin = time.perf_counter()
    dataset = nncf.Dataset([feed(inputs[i : i + 1], names) for i in range(len(inputs))])
    options = {"model_type": nncf.ModelType.TRANSFORMER} if len(names) > 1 else {}
    onnx.save(nncf.quantize(model, dataset, **options), target)
    print(json.dumps({"version": nncf.__version__, "seconds": time.perf_counter() - begin}))


def feed(sample: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """An image is the one input; of a text (1, K, S) each row is one, without its padding."""
    if len(names) == 1:
        return {names[0]: sample}
    length = int(sample[0, 1].sum())
    return {name: sample[:, row, :length].copy() for row, name in enumerate(names)}


if __name__ == "__main__":
    main()
