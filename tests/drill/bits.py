"""One bit flipped in a checkpoint: named and passed over by "latest", refused by name, and nothing else is lost."""

import json
import shutil

from harness import (
    RESUME,
    Case,
    Failed,
    Starts,
    bound,
    check_refusal,
    check_same_run,
    check_unchanged,
    metrics_of,
    scaled,
    snapshot,
)

NUM_CHECKPOINT, NUM_METRICS, NUM_OPTIONS = 50, 5, 5
NEWEST = "checkpoint-12"  # of the run that is harmed; checkpoint-6 is there to go back to


def cases(drill):
    """Each file of the checkpoint in turn; then those beside it."""
    files = sorted(path.name for path in (drill.references.get("twelve") / NEWEST).iterdir())
    turns = [files[i % len(files)] for i in range(scaled(NUM_CHECKPOINT, drill.scale))]
    inside = [Case(f"{i} {file}", bound(flip_in_checkpoint, drill.references, file)) for i, file in enumerate(turns)]
    beside = [
        Case(f"{i} {file}", bound(flip_beside, drill.references, file))
        for file, count in (("metrics.jsonl", NUM_METRICS), ("training_options.yaml", NUM_OPTIONS))
        for i in range(scaled(count, drill.scale))
    ]
    return inside + beside


def flip_bit(path, rng):
    """Flip a random bit of a file; returns where."""
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place}"


def flip_in_checkpoint(folder, rng, references, file):
    run = references.copy("twelve", folder / "run")
    flip_bit(run / NEWEST / file, rng)
    before = snapshot(run)
    with Starts() as starts:
        refused = starts.train(run, "--resume_from_checkpoint", NEWEST).wait(None)
        check_refusal(refused, "--resume_from_checkpoint", NEWEST)
        check_unchanged(run, before)
        resumed = starts.train(run, *RESUME).wait()
    if not any(NEWEST in line and "passed over" in line for line in resumed.lines):
        raise Failed("the damaged checkpoint is not named as passed over", resumed.output)
    check_same_run(run, references.get("plain"))


def flip_beside(folder, rng, references, file):
    """Harm to the log or the options: refused by the file's name, or gone on with, and nothing lost without a word."""
    run = references.copy("twelve", folder / "run")
    where = flip_bit(run / file, rng)
    before = snapshot(run)
    with Starts() as starts:
        resumed = starts.train(run, *RESUME).wait(None)
    if resumed.process.exitcode != 0:
        check_refusal(resumed, file)
        check_unchanged(run, before)
        return
    if "Traceback" in resumed.output:
        raise Failed("a traceback", resumed.output)
    reference = references.get("plain")
    if file == "metrics.jsonl":
        check_log(run, reference, resumed, where)
        shutil.copy(reference / file, run / file)  # a digit that became another digit is nobody's fault
    check_same_run(run, reference)


def check_log(run, reference, resumed, where):
    """All records are still there, unless the damage was named."""
    try:
        steps = [[record.get("step") for record in metrics_of(path / "metrics.jsonl")] for path in (run, reference)]
    except json.JSONDecodeError as error:
        raise Failed("metrics.jsonl is no JSON any more", f"{where}: {error}") from None
    if len(steps[0]) != len(steps[1]) and "metrics.jsonl" not in resumed.output:
        raise Failed("records of metrics.jsonl are lost without a word", f"{where}: steps {steps[0]}, not {steps[1]}")
