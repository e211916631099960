"""Dense linear algebra with a known answer."""

import time

import numpy as np

rng = np.random.default_rng(20261101)
print("numpy from", np.__file__)

matrix = rng.standard_normal((600, 600)) + 600 * np.eye(600)
right = rng.standard_normal(600)
solution = np.linalg.solve(matrix, right)
print("solve residual", np.abs(matrix @ solution - right).max())

# Of orthogonal matrices the product is orthogonal.
left, _ = np.linalg.qr(rng.standard_normal((400, 400)))
print("product error", np.abs(left @ left.T - np.eye(400)).max() / 400)

size, best_s = 1000, float("inf")
a, b = rng.standard_normal((size, size)), rng.standard_normal((size, size))
for _ in range(4):
    began_s = time.perf_counter()
    a @ b
    best_s = min(best_s, time.perf_counter() - began_s)
print(f"matrix product {2 * size**3 / best_s / 1e9:.2f} Gflop/s")
