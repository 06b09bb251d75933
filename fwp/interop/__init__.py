"""Fast weights behind other libraries' interfaces: PyTorch's attention, flash-linear-attention, transformers, ONNX."""
