"""What users do with the image: programs of C and Fortran are compiled against it, and read what its own programs compress."""

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import run_before, sanity_function

RAMP_SUM = 200 * sum(range(300))


@rfm.simple_test
class CompileAndRead(rfm.RunOnlyRegressionTest):
    """An image written by C, compressed by fpack, read by Fortran without anything in the environment."""

    descr = "C writes, fpack compresses, Fortran reads"
    valid_systems = ["*"]
    valid_prog_environs = ["+uenv +cfitsio"]
    executable = "./ramp_c ramp.fits"
    time_limit = "3m"

    @run_before("run")
    def compile_with_the_systems_compilers(self):
        self.prerun_cmds = [
            "gcc ramp.c $(pkg-config --cflags --libs cfitsio) -o ramp_c",
            "gfortran ramp.f90 -lcfitsio -o ramp_f",
        ]
        self.postrun_cmds = [
            "fpack ramp.fits",
            "env -i ./ramp_f ramp.fits.fz",
            "funpack -O unpacked.fits ramp.fits.fz",
            "env -i ./ramp_f unpacked.fits",
        ]

    @sanity_function
    def sums_agree(self):
        sums = sn.extractall(r"^sum (\d+)$", self.stdout, 1, int)
        return sn.all(
            [
                sn.assert_eq(sn.count(sums), 3),
                sn.assert_eq(sn.min(sums), RAMP_SUM),
                sn.assert_eq(sn.max(sums), RAMP_SUM),
            ]
        )
