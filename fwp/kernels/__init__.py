"""The Triton kernels. Their files stand in the top-level folder `kernels/`, see `fwp.bridge`."""

from fwp.bridge import extend

extend(__path__, "kernels")
