"""edgeattn: a compiler that takes lightweight attention models from PyTorch to the edge."""

__version__ = "0.1.0"
