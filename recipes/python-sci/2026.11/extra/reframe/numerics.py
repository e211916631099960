"""numpy and scipy compute the right thing, and not absurdly slowly."""

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import performance_function, sanity_function


@rfm.simple_test
class LinearAlgebra(rfm.RunOnlyRegressionTest):
    """Dense solve and matrix product: small residuals, and a BLAS that is one."""

    descr = "numpy: solve and matrix product"
    valid_systems = ["*"]
    valid_prog_environs = ["+uenv +numpy"]
    executable = "python3 linear_algebra.py"
    time_limit = "2m"
    # A BLAS that is none reaches some 0.1 Gflop/s; any real one several on a single core, also of a loaded machine.
    reference = {"*": {"matrix_product": (5.0, -0.8, None, "Gflop/s")}}

    @sanity_function
    def residuals_are_small(self):
        return sn.all(
            [
                sn.assert_lt(sn.extractsingle(r"^solve residual (\S+)$", self.stdout, 1, float), 1e-10),
                sn.assert_lt(sn.extractsingle(r"^product error (\S+)$", self.stdout, 1, float), 1e-12),
                sn.assert_found(r"^numpy from /user-environment/", self.stdout),
            ]
        )

    @performance_function("Gflop/s")
    def matrix_product(self):
        return sn.extractsingle(r"^matrix product (\S+) Gflop/s$", self.stdout, 1, float)


@rfm.simple_test
class SparsePoisson(rfm.RunOnlyRegressionTest):
    """The Poisson equation on a square, whose solution is known."""

    descr = "scipy: sparse direct and iterative solvers, an eigenvalue, a quadrature"
    valid_systems = ["*"]
    valid_prog_environs = ["+uenv +scipy"]
    executable = "python3 poisson.py"
    time_limit = "2m"

    @sanity_function
    def solutions_agree(self):
        return sn.all(
            [
                # Second order on 127 points: the error is some 1e-4.
                sn.assert_lt(sn.extractsingle(r"^error (\S+)$", self.stdout, 1, float), 1e-3),
                sn.assert_lt(
                    sn.extractsingle(r"^direct and iterative differ by (\S+)$", self.stdout, 1, float), 1e-7
                ),
                sn.assert_lt(sn.extractsingle(r"^eigenvalue differs by (\S+)$", self.stdout, 1, float), 1e-6),
                sn.assert_lt(
                    sn.extractsingle(r"^quadrature differs by (\S+)$", self.stdout, 1, float), 1e-10
                ),
            ]
        )


@rfm.simple_test
class VirtualEnvironment(rfm.RunOnlyRegressionTest):
    """Users add packages of their own: ``python -m venv`` works on top of the image, has its packages and stays with its interpreter."""

    descr = "python -m venv"
    valid_systems = ["*"]
    valid_prog_environs = ["+uenv +numpy"]
    executable = (
        "python3 -m venv --system-site-packages own && "
        "own/bin/python -c 'import numpy, sys; print(sys.prefix, sys.base_prefix, numpy.__file__, sep=chr(10))'"
    )
    postrun_cmds = ["own/bin/python -m pip --version"]
    time_limit = "2m"

    @sanity_function
    def interpreter_is_the_images(self):
        return sn.all(
            [
                sn.assert_found(r"/own$", self.stdout),
                sn.assert_found(r"^/user-environment/python", self.stdout),
                sn.assert_found(r"^/user-environment/env/default/.*/numpy/", self.stdout),
                sn.assert_found(r"^pip \d+.* from .*/own/lib/", self.stdout),
            ]
        )
