"""Fixtures of the tests on real components."""

from support.slurmsite import site, slurm_site

__all__ = ["site", "slurm_site"]
