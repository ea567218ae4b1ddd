"""The benchmark of the loop runs, and tells what is the harness."""

import re

from tests.tools import benchmark_loop


def test_the_harness_is_what_the_shortest_loop_does_without(capsys):
    assert benchmark_loop.main(["--steps", "6", "--tensors", "3", "--device", "cpu"]) == 0
    ours, bare, harness, share = map(float, re.findall(r"([\d.]+) (?:ms|%)", capsys.readouterr().out.splitlines()[-1]))
    assert 0 < bare < ours and abs(ours - bare - harness) < 0.02 and abs(share - harness / 5) < 0.02
