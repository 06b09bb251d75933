"""What checks, times and reproduces. The files stand in the top-level folder `benchmarks/`, see `fwp.bridge`."""

from fwp.bridge import extend

extend(__path__, "benchmarks")
