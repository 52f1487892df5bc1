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
    name = model.graph.input[0].name
    inputs = np.load(inputs_path, allow_pickle=False)
    begin = time.perf_counter()
    dataset = nncf.Dataset([{name: inputs[i : i + 1]} for i in range(len(inputs))])
    onnx.save(nncf.quantize(model, dataset), target)
    print(json.dumps({"version": nncf.__version__, "seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
