"""Backends: each runs the recurrence of `fwp.core` and knows neither a rule's name nor another backend."""
