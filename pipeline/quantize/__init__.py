"""Quantization: the float ONNX file → int8. Post-training with calibration (`ptq.py`)."""
