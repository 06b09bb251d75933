"""The Triton kernels behind `fwp`, and the layer that launches them."""
