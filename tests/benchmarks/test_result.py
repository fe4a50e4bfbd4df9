"""What every result file says of its run."""

import shlex

import job
import result


def test_a_command_can_be_pasted_into_a_shell(monkeypatch):
    words = ["benchmarks/steps_overhead.py", "--curves", "", "--out", "my results/x.json"]
    monkeypatch.setattr("sys.argv", words)
    assert shlex.split(result.begin("case", "device", "commit")["command"]) == ["python", *words]
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2"]
    assert shlex.split(job.command(2)) == [*torchrun, *words]
