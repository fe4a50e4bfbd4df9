"""`stretto doctor`: verdicts, ways out, exit code."""

import json
import sys
from types import SimpleNamespace

import pytest

from stretto.cli import app, doctor
from stretto.cli.doctor import Check, Report, Trial, Unmet
from stretto.cluster.detect import Found


def failing(error):
    def run():
        raise error

    return run


def test_json_of_this_machine(capsys):
    assert app.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["memory_bytes"] > 2**28
    assert report["libraries"]["core"]["torch"]
    assert report["libraries"]["dev"]["pytest"] == pytest.__version__
    works = {check["name"]: check["works"] for check in report["checks"]}
    assert works["torch"]
    assert works["ranks over gloo"]
    assert works["generate images"]


def test_an_essential_failure_is_exit_1_with_the_command_that_mends_it(monkeypatch, capsys):
    broken = Trial("torch", failing(OSError("libc10.so: no such file\nmore")), "replace it", True)
    monkeypatch.setattr(doctor, "trials", lambda: (broken,))
    assert app.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "libc10.so: no such file" in out
    assert "more" not in out
    assert "to mend: replace it" in out


def test_an_absent_extra_is_no_illness():
    check = Trial("generate video", failing(ImportError("no imageio")), "pip").check()
    assert check == Check("generate video", False, "no imageio", "pip", False)
    assert Report({}, {}, [check], []).healthy


def test_unmet_may_bring_its_own_way_out():
    assert Trial("GPU", failing(Unmet("none", fix="")), "install").check().fix == ""
    assert Trial("GPU", failing(Unmet("none")), "install").check().fix == "install"


def test_a_bug_in_a_trial_is_not_hidden():
    with pytest.raises(KeyError):
        Trial("torch", failing(KeyError("a bug")), "").check()


def test_torchvision_of_another_build_is_found(monkeypatch, tmp_path):
    """What a CUDA torchvision does beside a CPU torch: its import ends in a RuntimeError."""
    package = tmp_path / "torchvision"
    package.mkdir()
    source = "raise RuntimeError('operator torchvision::nms does not exist')"
    (package / "__init__.py").write_text(source)
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(Unmet, match=r"0\.28\.0 beside torch .*torchvision::nms does not exist"):
        doctor.try_torchvision()


def test_a_gpu_that_torch_does_not_see_is_named(monkeypatch):
    found = Found("cuda", "NVIDIA H200", 8, 2**37)
    monkeypatch.setattr(doctor.detect, "gpus", lambda: [found])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Unmet, match=r"8 x NVIDIA H200, but torch .* sees none") as caught:
        doctor.try_gpu()
    assert caught.value.fix is None  # the trial's own: a torch with CUDA


def test_no_gpu_asks_for_nothing(monkeypatch):
    monkeypatch.setattr(doctor.detect, "gpus", list)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Unmet, match="no CUDA device") as caught:
        doctor.try_gpu()
    assert caught.value.fix == ""


def test_an_old_torch_is_named_with_the_bound(monkeypatch):
    old = SimpleNamespace(__version__="2.9.1", version=SimpleNamespace(cuda=None))
    monkeypatch.setitem(sys.modules, "torch", old)
    with pytest.raises(Unmet, match=r"2\.9\.1.*needs 2\.11"):
        doctor.try_torch()


def test_the_bound_on_torch_is_the_declared_one():
    declared = [line for line in doctor.requirements()["core"] if line.startswith("torch")]
    assert declared == [f"torch>={'.'.join(map(str, doctor.OLDEST_TORCH))}"]


def test_the_way_out_installs_what_is_missing_of_the_extra(monkeypatch):
    assert doctor._install("diffusion") == ""
    installed = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name == "diffusers" else installed(name)
    )
    command = doctor._install("diffusion")
    assert command.startswith(f"{sys.executable} -m pip install 'diffusers>=")
    assert "transformers" not in command


def test_the_first_cause_is_shown():
    """diffusers wraps what its lazy modules raise in a text that names no cause."""

    def run():
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise RuntimeError("look up to see its traceback") from error

    assert Trial("generate images", run, "").check().seen.startswith("operator torchvision")


def test_missing_bytecode_is_warned_about(monkeypatch, tmp_path):
    cached = tmp_path / "torch.pyc"
    spec = SimpleNamespace(cached=str(cached), origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert any("compileall" in warning for warning in doctor.warnings())
    cached.touch()
    assert not any("compileall" in warning for warning in doctor.warnings())
