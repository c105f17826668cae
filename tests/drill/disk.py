"""A disk that is full, at the first file or just before the last: one line says so; with space the run goes on."""

import contextlib
import os
import re
import subprocess
import time

from harness import (
    FORMATS,
    RESUME,
    Case,
    Failed,
    Skipped,
    Starts,
    bound,
    check_refusal,
    check_same_images,
    check_same_run,
    scaled,
)

from training.checkpoints import checkpoint_damage, list_checkpoints

NUM_TRAIN, NUM_GENERATE = 11, 9
ENOUGH_KIB = 64 * 1024
SPACE = re.compile(r"\d[\d.,]* ?([kKMG]i?B|bytes)")


def cases(drill):
    """Sizes in equal steps, at random within each, of what the undisturbed run needs at its fullest."""
    num_train, num_generate = scaled(NUM_TRAIN, drill.scale), scaled(NUM_GENERATE, drill.scale)
    kinds = ["plain"] * num_train + [FORMATS[i % len(FORMATS)] for i in range(num_generate)]
    steps = [(i + drill.rng.random()) / num_train for i in range(num_train)]
    steps += [(i + drill.rng.random()) / num_generate for i in range(num_generate)]
    return [
        Case(f"{i}: {kind} with {share:.0%} of the space", bound(starved, drill.references, kind, share))
        for i, (kind, share) in enumerate(zip(kinds, steps, strict=True))
    ]


def starved(folder, rng, references, kind, share):
    reference = references.get(kind)
    needed = peak_kib(references, kind, folder / "measured")
    with small_disk(folder / "disk", max(4, int(share * needed))) as disk, Starts() as starts:
        start = begin(starts, references, kind, disk, []).wait(None)
        if start.process.exitcode != 0:  # by a thread's timing, the fullest moment may have been less full
            check_full(start, disk)
            check_checkpoints(disk)
            resize(disk, ENOUGH_KIB)
            begin(starts, references, kind, disk, RESUME if kind == "plain" else []).wait()
        check = check_same_run if kind == "plain" else check_same_images
        check(disk, reference)


def begin(starts, references, kind, disk, flags):
    """Train or generate into the small disk; the log goes elsewhere."""
    log_path = disk.with_suffix(".log")
    if kind == "plain":
        return starts.train(disk, *flags, log_path=log_path)
    return starts.generate(disk, references.get("plain"), kind, *flags, log_path=log_path)


def check_full(start, disk):
    """One line that names the file (or the folder) and the space that is left or needed."""
    check_refusal(start, disk)
    if not SPACE.search(start.lines[-1]):
        raise Failed("the line does not tell the space", start.lines[-1])


def check_checkpoints(run):
    for _, checkpoint in list_checkpoints(run):
        if damage := checkpoint_damage(checkpoint):
            raise Failed("a checkpoint is damaged", f"{checkpoint.name}: {damage}")


# The small disk


@contextlib.contextmanager
def small_disk(folder, kib):
    """A tmpfs of so many KiB."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "drill", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        raise Skipped(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder, kib):
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(folder)], check=True)


def peak_kib(references, kind, folder):
    """What an undisturbed run fills at its fullest, measured once for each kind."""
    with references.lock:
        peaks = references.__dict__.setdefault("peaks", {})
        if kind not in peaks:
            with small_disk(folder, ENOUGH_KIB) as disk, Starts() as starts:
                start = begin(starts, references, kind, disk, [])
                peaks[kind] = 0
                while start.process.exitcode is None:
                    peaks[kind] = max(peaks[kind], used_kib(disk))
                    time.sleep(0.002)
                start.wait()
        return peaks[kind]


def used_kib(folder):
    state = os.statvfs(folder)
    return (state.f_blocks - state.f_bfree) * state.f_frsize // 1024
