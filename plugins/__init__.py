"""The generic TensorRT plugin that runs any op's compiled kernel."""
