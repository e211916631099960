"""Heat that spreads over a square plate, in parallel: run with any number of MPI ranks, each holds some rows of the plate.

Each implicit time step solves a sparse linear system with conjugate gradients: the matrix product needs the neighbours'
border rows, the scalar products need all ranks. Rank 0 then solves the same problem alone with a direct solver, compares,
and ends with status 1 if the two differ.
"""

from __future__ import annotations

import os
import socket
import sys
import time

import numpy as np
import scipy
import scipy.sparse as sparse
from mpi4py import MPI
from numpy.typing import NDArray
from scipy.sparse.linalg import factorized

Field = NDArray[np.float64]

POINTS = 96
"""Grid points along each side of the plate."""
STEPS = 10
DIFFUSION = 20.0
"""Diffusivity times time step over the squared grid spacing: dimensionless."""
TOLERANCE = 1e-8
"""Largest difference from the serial result, relative to its largest value."""


def system(rows: int) -> sparse.csr_array:
    """Return the matrix of one implicit step on ``rows`` rows of the plate, without their coupling to other rows."""
    side = sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(POINTS, POINTS))
    across = sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(rows, rows))
    laplacian = sparse.kron(across, sparse.eye_array(POINTS)) + sparse.kron(sparse.eye_array(rows), side)
    return sparse.csr_array(sparse.eye_array(rows * POINTS) + DIFFUSION * laplacian)


def start() -> Field:
    """Return the initial temperatures of the whole plate, shape (POINTS, POINTS)."""
    x = np.linspace(-1.0, 1.0, POINTS)
    warm = np.exp(-20 * ((x[:, None] - 0.3) ** 2 + (x[None, :] + 0.2) ** 2))
    return np.asarray(warm + (np.abs(x[:, None] + 0.5) < 0.1))


class Strip:
    """This rank's rows of the plate and the operations that involve the other ranks."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm
        bounds = [POINTS * rank // comm.size for rank in range(comm.size + 1)]
        self.first, self.end = bounds[comm.rank], bounds[comm.rank + 1]
        self.above = comm.rank - 1 if comm.rank > 0 else MPI.PROC_NULL
        self.below = comm.rank + 1 if comm.rank < comm.size - 1 else MPI.PROC_NULL
        self.matrix = system(self.end - self.first)
        self.halo = np.zeros((2, POINTS))

    def product(self, field: Field) -> Field:
        """Return matrix times ``field``, both of shape (own rows, POINTS)."""
        self.comm.Sendrecv(field[0], self.above, recvbuf=self.halo[1], source=self.below)
        self.comm.Sendrecv(field[-1], self.below, recvbuf=self.halo[0], source=self.above)
        result = (self.matrix @ field.ravel()).reshape(field.shape)
        result[0] -= DIFFUSION * self.halo[0]
        result[-1] -= DIFFUSION * self.halo[1]
        return np.asarray(result)

    def dot(self, left: Field, right: Field) -> float:
        """Return the scalar product over all ranks."""
        return float(self.comm.allreduce(float(np.vdot(left, right))))

    def solve(self, right: Field) -> tuple[Field, int]:
        """Return the solution of ``matrix @ x = right`` by conjugate gradients, and the number of iterations."""
        x = right.copy()
        residual = right - self.product(x)
        direction = residual.copy()
        square = self.dot(residual, residual)
        limit = (TOLERANCE / 100) ** 2 * self.dot(right, right)
        iterations = 0
        while square > limit:
            image = self.product(direction)
            step = square / self.dot(direction, image)
            x += step * direction
            residual -= step * image
            square, before = self.dot(residual, residual), square
            direction = residual + (square / before) * direction
            iterations += 1
        return x, iterations


def serial() -> Field:
    """Return the final temperatures, computed by one process with a direct solver."""
    solve = factorized(sparse.csc_array(system(POINTS)))
    field = start().ravel()
    for _ in range(STEPS):
        field = solve(field)
    return np.asarray(field.reshape(POINTS, POINTS))


def main() -> int:
    """Return the exit status, the same on all ranks."""
    comm = MPI.COMM_WORLD
    strip = Strip(comm)
    field = start()[strip.first : strip.end].copy()
    began_s = time.monotonic()
    iterations = 0
    for _ in range(STEPS):
        field, more = strip.solve(field)
        iterations += more
    elapsed_s = time.monotonic() - began_s
    plate = np.zeros((POINTS, POINTS)) if comm.rank == 0 else None
    counts = comm.gather(field.size)
    comm.Gatherv(field, None if plate is None else (plate, counts))

    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    for line in (
        comm.gather(f"rank {comm.rank} of {comm.size} on {node}: rows {strip.first} to {strip.end - 1}") or ()
    ):
        print(line)
    difference = 0.0
    if plate is not None:
        reference = serial()
        difference = float(np.abs(plate - reference).max() / np.abs(reference).max())
        print(
            f"numpy {np.__version__}, scipy {scipy.__version__}, {MPI.Get_library_version().splitlines()[0]}"
        )
        print(f"python {sys.version.split()[0]} from {sys.executable}")
        print(f"{STEPS} steps on {POINTS} x {POINTS} points, {iterations} iterations in {elapsed_s:.2f} s")
        verdict = "equal" if difference < TOLERANCE else "WRONG"
        print(
            f"parallel and serial result are {verdict}: largest relative difference {difference:.1e}",
            flush=True,
        )
    return int(comm.bcast(difference) >= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
