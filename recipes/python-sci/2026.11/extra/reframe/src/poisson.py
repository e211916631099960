"""-Laplace(u) = f on the unit square with u = sin(pi x) sin(pi y), by two solvers; its smallest eigenvalue; an integral."""

import numpy as np
import scipy.integrate
import scipy.sparse as sparse
from scipy.sparse.linalg import cg, eigsh, spsolve

n = 127
h = 1 / (n + 1)
line = sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n)) / h**2
one = sparse.eye_array(n)
laplacian = sparse.csc_array(sparse.kron(line, one) + sparse.kron(one, line))
x = np.linspace(h, 1 - h, n)
exact = np.outer(np.sin(np.pi * x), np.sin(np.pi * x)).ravel()
right = 2 * np.pi**2 * exact

direct = spsolve(laplacian, right)
iterative, info = cg(laplacian, right, rtol=1e-10)
if info != 0:
    raise SystemExit(f"conjugate gradients ended with {info}")
print("error", np.abs(direct - exact).max())
print("direct and iterative differ by", np.abs(direct - iterative).max())

discrete = 2 * 4 / h**2 * np.sin(np.pi * h / 2) ** 2
(smallest,) = eigsh(laplacian, k=1, sigma=0.0, return_eigenvectors=False)
print("eigenvalue differs by", abs(smallest - discrete) / discrete)

integral, _ = scipy.integrate.quad(lambda t: np.exp(-(t**2)), -np.inf, np.inf)
print("quadrature differs by", abs(integral - np.sqrt(np.pi)))
