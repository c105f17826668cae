"""What a run's numbers depend on beside its options."""

import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def this_command() -> str:
    """The command line of this process, as it is to be typed again."""
    return shlex.join(["python", *sys.argv])


def library_versions() -> dict[str, str]:
    """{package: version} of what decides speed and numbers."""
    return {name: version(name) for name in ("torch", "diffusers", "accelerate")}


def code_commit(folder: Path = Path(__file__).parent) -> str | None:
    """The git commit of the code in this folder, and a "+" if files that git knows have been changed since; None where
    git knows none."""
    command = ["git", "-C", folder, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, no commit
        return None


def device_name(device: torch.device) -> str:
    """The processor as a person would name it; a CPU with the vector instructions that PyTorch uses of it and its
    threads, because virtual machines of one name may differ several times in speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{processor_name()} ({instructions}), {torch.get_num_threads()} threads"


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model; its architecture alone where the kernel does not name one (outside Linux, on most ARM)."""
    try:
        model = re.search(r"^model name[ \t]*: *(\S.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else f"{platform.processor() or platform.machine()} CPU"
