"""PyTorch model to ONNX file."""
