"""Fixtures of the tests on real components."""

from support.slurmcentre import centre, centre_for_all
from support.slurmsite import site, slurm_site

__all__ = ["centre", "centre_for_all", "site", "slurm_site"]
