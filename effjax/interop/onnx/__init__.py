"""ONNX: decoders as graphs that ONNX Runtime and TensorRT run."""
