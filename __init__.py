"""edgestill: distil a large teacher into a small int8 .onnx, with proof."""

__version__ = "0.1.0"
