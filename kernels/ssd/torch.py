"""Interim: the sequential form, until the chunked one lands."""

from triptych.kernels.ssd.reference import ssd

__all__ = ["ssd"]
