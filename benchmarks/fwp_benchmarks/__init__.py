"""What `fwp check`, `fwp bench` and `fwp reproduce` run."""
