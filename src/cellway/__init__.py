"""Cellway: a compute control plane partitioned into cells. The house is described in docs/architecture.md."""

__version__ = "0.1.0"
