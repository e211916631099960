"""A site with a history for tests of the catalogue: three environments, four versions each, two machines, reports with figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.publishing import Publisher, make_squashfs
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, attach, directory_content, json_content
from uenvd.oci.reference import repository_of
from uenvd.publish.console import say
from uenvd.publish.releases import DEPRECATION_TYPE, Deprecation, reindex

Values = Mapping[str, tuple[float, float | None, float | None, float | None, str]]
"""variable -> (value, reference, lower, upper, unit)."""

MACHINES = (("daint", "gh200"), ("eiger", "zen2"))
NEWEST = "2026-10"


def perf_report(system: str, tests: Mapping[str, Values], failing: Sequence[str] = ()) -> bytes:
    """Return a report of ReFrame whose tests measured something."""
    cases = [
        {
            "name": name,
            "display_name": name,
            "unique_name": name,
            "system": system,
            "partition": "normal",
            "environ": "image",
            "result": "fail" if name in failing else "pass",
            "fail_phase": "sanity" if name in failing else None,
            "fail_reason": "wrong answer" if name in failing else None,
            "perfvalues": {f"{system}:normal:{key}": [*value, "pass"] for key, value in values.items()},
        }
        for name, values in tests.items()
    ]
    run = {
        "run_index": 0,
        "num_cases": len(cases),
        "num_failures": len(failing),
        "num_aborted": 0,
        "num_skipped": 0,
        "testcases": cases,
    }
    session = {"data_version": "4.2", "version": "4.10.4", "num_cases": len(cases)}
    return json.dumps({"session_info": session, "runs": [run], "restored_cases": []}).encode()


def _environment(name: str, text: str, views: Mapping[str, str]) -> bytes:
    body: dict[str, Any] = {
        "name": name,
        "description": text,
        "mount": "/user-environment",
        "modules": None,
        "default-view": next(iter(views)),
        "views": {
            view: {
                "activate": "",
                "description": about,
                "root": "",
                "env": {"version": 1, "values": {"list": {}, "scalar": {"V": view}}},
            }
            for view, about in views.items()
        },
    }
    return json.dumps(body).encode()


SITE: dict[str, dict[str, Any]] = {
    "prgenv-gnu": {
        "text": "Compilers, MPI and the libraries that most codes are built with: GCC, Cray MPICH, HDF5, NetCDF, FFTW and Python.",
        "views": {
            "default": "Compilers, MPI and libraries in the usual places",
            "modules": "The same as modules, for those who prefer them",
        },
        "versions": {
            "24.7": {
                "gcc": "12.3.0",
                "cray-mpich": "8.1.29",
                "hdf5": "1.14.3",
                "netcdf-c": "4.9.2",
                "fftw": "3.3.10",
                "python": "3.11.7",
                "cmake": "3.27.9",
                "openblas": "0.3.26",
            },
            "24.11": {
                "gcc": "13.3.0",
                "cray-mpich": "8.1.30",
                "hdf5": "1.14.5",
                "netcdf-c": "4.9.2",
                "fftw": "3.3.10",
                "python": "3.12.5",
                "cmake": "3.30.5",
                "openblas": "0.3.28",
            },
            "25.6": {
                "gcc": "13.3.0",
                "cray-mpich": "8.1.32",
                "hdf5": "1.14.6",
                "netcdf-c": "4.9.3",
                "fftw": "3.3.10",
                "python": "3.13.0",
                "cmake": "3.31.6",
                "openblas": "0.3.29",
                "kokkos": "4.5.1",
            },
            "26.3": {
                "gcc": "14.2.0",
                "cray-mpich": "9.0.0",
                "hdf5": "1.14.6",
                "netcdf-c": "4.9.3",
                "fftw": "3.3.10",
                "python": "3.13.2",
                "cmake": "4.0.3",
                "openblas": "0.3.30",
                "kokkos": "4.7.0",
            },
        },
        "tests": lambda step, fast: {
            "OSU_Allreduce": {
                "latency_8B": ((2.31, 2.24, 2.02, 1.88)[step] * (1 if fast else 1.4), 2.2, None, 0.15, "us")
            },
            "OSU_Bandwidth": {
                "bandwidth_4MB": (
                    (21.4, 22.0, 23.9, 24.1)[step] * (1 if fast else 0.5),
                    23.0,
                    -0.1,
                    None,
                    "GB/s",
                )
            },
            "HDF5_Parallel_Write": {
                "write_rate": ((5.1, 5.3, 5.25, 4.5)[step] * (1 if fast else 0.7), None, None, None, "GB/s")
            },
            "Hello_MPI": {},
        },
    },
    "python-sci": {
        "text": "Python with numpy, scipy, pandas, h5py and mpi4py, ready for notebooks.",
        "views": {"default": "Python and its packages first in PATH", "jupyter": "The same with JupyterLab"},
        "versions": {
            "2025.1": {
                "python": "3.12.5",
                "numpy": "1.26.4",
                "scipy": "1.12.0",
                "pandas": "2.2.1",
                "h5py": "3.10.0",
                "mpi4py": "3.1.5",
            },
            "2025.7": {
                "python": "3.12.8",
                "numpy": "2.0.2",
                "scipy": "1.14.1",
                "pandas": "2.2.3",
                "h5py": "3.12.1",
                "mpi4py": "4.0.1",
                "jupyterlab": "4.3.0",
            },
            "2026.2": {
                "python": "3.13.0",
                "numpy": "2.2.0",
                "scipy": "1.15.2",
                "pandas": "2.2.3",
                "h5py": "3.13.0",
                "mpi4py": "4.0.3",
                "jupyterlab": "4.4.1",
            },
            "2026.9": {
                "python": "3.13.2",
                "numpy": "2.4.6",
                "scipy": "1.17.0",
                "pandas": "3.0.0",
                "h5py": "3.15.0",
                "mpi4py": "4.1.0",
                "jupyterlab": "4.5.0",
            },
        },
        "tests": lambda step, fast: {
            "Import_All": {
                "time": ((1.92, 1.71, 1.66, 1.21)[step] * (1 if fast else 1.15), 1.7, None, 0.25, "s")
            },
            "Dgemm_Numpy": {
                "performance": (
                    (612.0, 655.0, 661.0, 702.0)[step] * (1 if fast else 0.42),
                    640.0,
                    -0.1,
                    None,
                    "Gflop/s",
                )
            },
            "Mpi4py_Allgather": {},
        },
    },
    "quantum-espresso": {
        "text": "Plane-wave density functional theory (pw.x and friends) with CUDA where there are GPUs, and all that is needed to build it oneself.",
        "views": {
            "default": "pw.x and the other programs",
            "develop": "Compilers and libraries to build your own",
        },
        "versions": {
            "7.1": {"quantum-espresso": "7.1", "nvhpc": "22.11", "fftw": "3.3.10", "hdf5": "1.12.2"},
            "7.2": {"quantum-espresso": "7.2", "nvhpc": "23.9", "fftw": "3.3.10", "hdf5": "1.14.3"},
            "7.3.1": {"quantum-espresso": "7.3.1", "nvhpc": "24.3", "fftw": "3.3.10", "hdf5": "1.14.3"},
            "7.4": {
                "quantum-espresso": "7.4",
                "nvhpc": "24.9",
                "fftw": "3.3.10",
                "hdf5": "1.14.5",
                "elpa": "2024.05.001",
            },
        },
        "tests": lambda step, fast: {
            "QE_Au_Surf": {
                "time": ((182.0, 171.0, 150.0, 141.0)[step] * (1 if fast else 2.1), None, None, None, "s")
            },
            "QE_Si_Bands": {},
        },
    },
}
_DAYS = ("2025-01-14", "2025-07-03", "2026-02-11", f"{NEWEST}-21")


def publish_site(
    registry: str, directory: Path, site: Mapping[str, Mapping[str, Any]] | None = None
) -> Publisher:
    """Put the site into a registry: for each version and machine an image with metadata, packages and a report; indexes; a deprecation."""
    publisher = Publisher(registry)
    remote = publisher.remote
    for name, about in (site or SITE).items():
        versions = list(about["versions"])
        for step, version in enumerate(versions):
            meta = _environment(name, about["text"], about["views"])
            files: dict[str, bytes | str] = {
                "word": f"{name} {version}",
                "ballast": bytes(range(256)) * (4000 + 900 * step),
            }
            image = make_squashfs(
                directory / f"{name}-{version}.squashfs", files, meta=meta, options=("-noD",)
            )
            recipe = directory / "meta"
            (recipe / "recipe").mkdir(parents=True, exist_ok=True)
            (recipe / "env.json").write_bytes(meta)
            pinned = "".join(
                f"{package}=={number}\n" for package, number in about["versions"][version].items()
            )
            (recipe / "recipe" / "packages.lock").write_text(pinned)
            for system, uarch in MACHINES:
                when = f"{_DAYS[step]}T12:00:00Z"
                digest = publisher.push(
                    image, f"{name}/{version}", "v1", "latest", system=system, uarch=uarch, created=when
                )
                repository = repository_of("deploy", system, uarch, name, version)
                raw = perf_report(system, about["tests"](step, system == "daint"))
                attach(
                    remote, repository, digest, REFRAME_TYPE, [json_content("report.json", raw)], created=when
                )
                attach(remote, repository, digest, META_TYPE, [directory_content(recipe)], created=when)
                if step == 0 and len(versions) > 1:
                    told = Deprecation(
                        "its compilers are no longer supported", "2027-01-31", f"{name}/{versions[-1]}:v1"
                    )
                    attach(
                        remote,
                        repository,
                        digest,
                        DEPRECATION_TYPE,
                        [json_content("deprecation.json", told.encode())],
                        created=when,
                    )
            image.unlink()
    for system, _uarch in MACHINES:
        reindex(remote, "deploy", system, say)
    return publisher
