"""MPI over two nodes: under Slurm really two, without it as many processes of one machine, started by the image's mpiexec."""

import shutil

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import performance_function, run_before, sanity_function


class MpiTest(rfm.RegressionMixin):
    """Starts with the kind of MPI bootstrap that the environment names for srun."""

    @run_before("run")
    def start_as_the_image_wants(self):
        bootstrap = self.current_environ.extras.get("srun_mpi")
        if bootstrap and self.job.launcher.registered_name == "srun":
            self.job.launcher.options += [f"--mpi={bootstrap}"]

    def on_all_nodes(self, pattern):
        """Assert that the text matched by the group differs between as many places as there are nodes."""
        nodes = (
            self.num_tasks // self.num_tasks_per_node if "remote" in self.current_partition.features else 1
        )
        return sn.assert_eq(sn.count_uniq(sn.extractall(pattern, self.stdout, 1)), nodes)


@rfm.simple_test
class AllRanks(rfm.RunOnlyRegressionTest, MpiTest):
    """``comm.size == ntasks`` on every rank: not as many programs of one rank each, as with the wrong bootstrap."""

    descr = "mpi4py: the communicator has all tasks, on two nodes"
    valid_systems = ["*"]
    valid_prog_environs = ["+uenv +mpi4py"]
    executable = "python3 ranks.py"
    num_tasks = 4
    num_tasks_per_node = 2
    time_limit = "3m"

    @sanity_function
    def one_communicator(self):
        ranks = sn.extractall(
            rf"^rank (\d+) of {self.num_tasks} on \S+ sum {self._sum()}$", self.stdout, 1, int
        )
        return sn.all(
            [
                sn.assert_eq(sn.sorted(ranks), list(range(self.num_tasks))),
                self.on_all_nodes(r"^rank \d+ of \d+ on (\S+)"),
            ]
        )

    def _sum(self):
        return sum(range(1, self.num_tasks + 1))


@rfm.simple_test
class PingPong(rfm.RunOnlyRegressionTest, MpiTest):
    """What arrives is what was sent; how fast is recorded, as it depends on the network."""

    descr = "mpi4py: ping-pong between two tasks"
    valid_systems = ["*"]
    valid_prog_environs = ["+uenv +mpi4py"]
    executable = "python3 pingpong.py"
    num_tasks = 2
    num_tasks_per_node = 1
    time_limit = "3m"

    @sanity_function
    def nothing_is_lost(self):
        return sn.assert_found(r"^all messages are right$", self.stdout)

    @performance_function("us")
    def latency(self):
        return sn.extractsingle(r"^latency (\S+) us$", self.stdout, 1, float)

    @performance_function("MB/s")
    def bandwidth(self):
        return sn.extractsingle(r"^bandwidth (\S+) MB/s$", self.stdout, 1, float)


@rfm.simple_test
class CompiledRanks(rfm.RegressionTest, MpiTest):
    """The view ``develop``: a C program is compiled against the image's MPI, and finds its library when it runs."""

    descr = "mpicc: compile and run"
    valid_systems = ["*"]
    valid_prog_environs = ["+uenv +mpi-devel"]
    build_system = "SingleSource"
    sourcepath = "ranks.c"
    num_tasks = 4
    num_tasks_per_node = 2
    time_limit = "3m"

    @run_before("compile")
    def needs_a_compiler(self):
        self.skip_if(
            "remote" not in self.current_partition.features and shutil.which("cc") is None,
            "the image has no C compiler and neither has this machine",
        )

    @sanity_function
    def one_communicator(self):
        ranks = sn.extractall(rf"^rank (\d+) of {self.num_tasks} on \S+$", self.stdout, 1, int)
        return sn.assert_eq(sn.sorted(ranks), list(range(self.num_tasks)))
