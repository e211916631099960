"""uenvd: scientific software stacks as squashfs images, served to Slurm jobs and shells."""

__version__ = "0.1.0"
