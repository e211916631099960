"""Messages between two ranks, there and back, checked; latency of small ones, bandwidth of large ones."""

import time

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
if comm.size != 2:
    raise SystemExit(f"this needs 2 tasks, not {comm.size}")
peer = 1 - comm.rank


def round_trip_s(size_bytes: int, repeats: int) -> float:
    """Return the mean time of a message there and back."""
    rng = np.random.default_rng(size_bytes)
    sent = rng.integers(0, 255, size_bytes, dtype=np.uint8)
    received = np.empty_like(sent)
    comm.Barrier()
    began_s = time.perf_counter()
    for _ in range(repeats):
        if comm.rank == 0:
            comm.Send(sent, peer)
            comm.Recv(received, peer)
        else:
            comm.Recv(received, peer)
            comm.Send(received, peer)
    elapsed_s = time.perf_counter() - began_s
    if not np.array_equal(sent, received):
        print("a message of", size_bytes, "bytes arrived changed", flush=True)
        comm.Abort(1)
    return elapsed_s / repeats


round_trip_s(8, 50)  # connections are made by the first message
small_s = round_trip_s(8, 300)
large_s = round_trip_s(1 << 20, 20)
if comm.rank == 0:
    print(f"latency {small_s / 2 * 1e6:.2f} us")
    print(f"bandwidth {2 * (1 << 20) / large_s / 1e6:.1f} MB/s")
    print("all messages are right")
