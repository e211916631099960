"""A plan that runs: each cell is built, tested and deployed, here, as Slurm jobs or through FirecREST, and goes on where a killed run stopped."""
