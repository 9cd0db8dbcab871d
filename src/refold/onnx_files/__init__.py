"""ONNX files as networks: read, folded, and written back with nothing else changed."""
