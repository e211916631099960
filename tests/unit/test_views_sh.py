"""Activation scripts of early-2024 images are translated, never run."""

from __future__ import annotations

import time
from typing import Any

import pytest

from uenvd.views_sh import script_ops


@pytest.mark.parametrize(
    ("script", "ops"),
    [
        ("", []),
        ("# export A=1", []),
        ("export A=1", [["set", "A", "1"]]),
        ("A=1", [["set", "A", "1"]]),
        ("A=1 command", []),
        ("export A", []),
        ("export A=", [["set", "A", ""]]),
        ("export A=1 B=2; export C=3 # D=4", [["set", "A", "1"], ["set", "B", "2"], ["set", "C", "3"]]),
        ("export A='a b' B=\"c d\" C=e\\ f D=g'h'\"i\"j", [["set", "A", "a b"], ["set", "B", "c d"], ["set", "C", "e f"], ["set", "D", "ghij"]]),
        ("export A='$X ${Y} `z`'", [["set", "A", "$X ${Y} `z`"]]),
        ('export A="\\$X \\"q\\" \\n"', [["set", "A", '$X "q" \\n']]),
        ("export A=a\\\nb", [["set", "A", "ab"]]),
        ('export A="two\nlines"', [["set", "A", "two\nlines"]]),
        ("export A=$HOME/x B=${USER}y", [["set", "A", "${@HOME@}/x"], ["set", "B", "${@USER@}y"]]),
        ("export A=$", [["set", "A", "$"]]),
        ("export A=$(id) B=`id` C=$((1+1)) D=$1 E=${X:-d} F=1", [["set", "F", "1"]]),
        ("A=$(export B=1; echo (x)); export C=1", [["set", "C", "1"]]),
        ("A=`export B=1`; export C=1", [["set", "C", "1"]]),
        ("export A=$(unterminated\nexport B=1", []),
        ("export A='unterminated\nexport B=1", []),
        ('export A="unterminated\nexport B=1', []),
        ("unset A B $C", [["unset", "A"], ["unset", "B"]]),
        ("unset -f A", []),
        ("unset -v A", [["unset", "A"]]),
        ("alias x='export A=1';", []),
        ("if [ -z \"$X\" ]; then export A=1; fi", []),
        ("[ -d /x ] && export A=1 || export B=2", [["set", "A", "1"], ["set", "B", "2"]]),
        ("export PATH=/u/bin:$PATH", [["prepend", "PATH", ["/u/bin"]]]),
        ('export PATH="/u/bin:${PATH}"', [["prepend", "PATH", ["/u/bin"]]]),
        ("export PATH=$PATH:/u/bin", [["append", "PATH", ["/u/bin"]]]),
        ("export PATH=/a:$PATH:/b", [["prepend", "PATH", ["/a"]], ["append", "PATH", ["/b"]]]),
        ("export PATH=/u/bin:/usr/bin:/bin:/usr/local/bin/", [["prepend", "PATH", ["/u/bin"]]]),
        ("export PATH=/usr/bin:/bin", []),
        ("export PATH=", []),
        ("export CPATH=/u/include${CPATH:+:$CPATH}", [["prepend", "CPATH", ["/u/include"]]]),
        ("export CPATH=/u/include${CPATH:+:${CPATH}}", [["prepend", "CPATH", ["/u/include"]]]),
        ("export CPATH=${CPATH:+$CPATH:}/u/include", [["append", "CPATH", ["/u/include"]]]),
        ("export PYTHONPATH=$HOME/lib::/u", [["prepend", "PYTHONPATH", ["${@HOME@}/lib", "/u"]]]),
        ("export OTHER=/a:$OTHER", [["prepend", "OTHER", ["/a"]]]),
        ("export OTHER=/a:/b", [["set", "OTHER", "/a:/b"]]),
        ("export SPACK_ENV=/x HOME=/y PS1=z PWD=/ _=q 9=1 A-B=2", []),
        ("export A=\0B", [["set", "A", "B"]]),
        ("export A=a#b", [["set", "A", "a#b"]]),
        ("export A={x,y}", [["set", "A", "{x,y}"]]),
    ],
)  # fmt: skip
def test_scripts(script: str, ops: list[list[Any]]) -> None:
    assert script_ops(script) == ops


@pytest.mark.parametrize(
    "piece", ["'", '"', "`", "$(", "(", "${", "\\", "export A=$A:", "A=1;", "$A", "a ", "\n", "#"]
)
def test_hostile_scripts_take_linear_time(piece: str) -> None:
    start = time.process_time()
    script_ops(piece * (200_000 // len(piece)))
    assert time.process_time() - start < 5.0
