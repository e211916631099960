"""Every rank says who it is and what all of them add up to, one line each."""

import os
import socket

from mpi4py import MPI

comm = MPI.COMM_WORLD
total = comm.allreduce(comm.rank + 1)
node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
for line in comm.gather(f"rank {comm.rank} of {comm.size} on {node} sum {total}") or ():
    print(line, flush=True)
