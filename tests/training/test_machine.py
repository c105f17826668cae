"""What a record says of the machine that it was made on."""

import platform
import subprocess

import pytest
import torch

from training.machine import code_commit, device_name, processor_name

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
model\t\t: 143
model name\t: Intel(R) Xeon(R) Platinum 8480C
flags\t\t: fpu

processor\t: 1
model name\t: Another
"""


@pytest.mark.parametrize("content", [None, "", "processor\t: 0\nmodel name\t:\nCPU part\t: 0xd0c\n"])
def test_a_processor_that_the_kernel_does_not_name_is_named_by_its_architecture(tmp_path, content):
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    name = processor_name(tmp_path / "cpuinfo")
    assert name == f"{platform.processor() or platform.machine()} CPU"


def test_a_processor_is_named_by_its_model(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    assert processor_name(tmp_path / "cpuinfo") == "Intel(R) Xeon(R) Platinum 8480C"
    monkeypatch.setattr("training.machine.processor_name", lambda: "Z80")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX9")
    assert device_name(torch.device("cpu")) == f"Z80 (AVX9), {torch.get_num_threads()} threads"


def test_code_is_named_by_its_commit_and_whether_it_was_changed_since(tmp_path):
    def git(*words):
        own = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", tmp_path, *own, *words], capture_output=True, text=True, check=True).stdout

    assert code_commit(tmp_path / "absent") is None
    git("init")
    assert code_commit(tmp_path) is None  # there is no commit yet
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "-a", "-m", "x", "v1")
    commit = git("rev-parse", "HEAD").strip()
    (tmp_path / "untracked").touch()
    assert code_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("2")
    assert code_commit(tmp_path) == f"{commit}+"
