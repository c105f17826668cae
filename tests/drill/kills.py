"""SIGKILL at random moments of training, saving, generating and comparing; resumed, the end is that of a run that
nothing disturbed, bit for bit."""

import functools
import shutil

from harness import (
    FORMATS,
    RESUME,
    STREAM,
    TIMEOUT,
    Case,
    Failed,
    Starts,
    bound,
    check_comparison,
    check_same_images,
    check_same_run,
    need_extractor,
    scaled,
)
from test_resuming import kill_at

NUM_TRAIN, NUM_SAVE, NUM_GENERATE, NUM_COMPARE = 40, 25, 25, 10
MOST_KILLS = 3  # of one run
ATTEMPTS = 6  # at a moment that comes before the run ends by itself

# Where a save can be torn: module, function, and how often an undisturbed run calls it. `os.replace` puts checkpoints,
# parts of the pipeline and JSON files in place; `save_accelerator_state` is followed by the random states.
SAVING = (
    ("training.state", "save_checkpoint", 4),
    ("training.checkpoints", "_checksums", 4),
    ("training.checkpoints", "list_checkpoints", 5),
    ("training.checkpoints", "put_in_place", 4),
    ("accelerate.accelerator", "save_accelerator_state", 4),
    ("training.results", "save_pipeline", 1),
    ("training.saving", "named_save_errors", 1),
    ("os", "replace", 8),
    ("torch", "save", 8),
    ("shutil", "rmtree", 6),
)
WRITING_IMAGES = (("os", "replace", 13), ("generation.folder", "write_record", 2), ("generate", "finish_folder", 1))


def cases(drill):
    """A case is one run, killed once or more."""
    kinds = ["plain", "plain", "plain", "plain", "stream", "ranks"]
    train = [
        Case(f"train {i} ({kind})", bound(train_killed, drill.references, kind))
        for i, kind in zip(range(scaled(NUM_TRAIN, drill.scale)), kinds * NUM_TRAIN, strict=False)
    ]
    save = [
        Case(f"save {i}", bound(save_killed, drill.references, point))
        for i, point in zip(range(scaled(NUM_SAVE, drill.scale)), shuffled(SAVING * NUM_SAVE, drill.rng), strict=False)
    ]
    generate = [
        Case(f"generate {i} ({fmt})", bound(generate_killed, drill.references, fmt))
        for i, fmt in zip(range(scaled(NUM_GENERATE, drill.scale)), FORMATS * NUM_GENERATE, strict=False)
    ]
    compare = [
        Case(f"compare {i}", bound(compare_killed, drill.references, with_children=i % 2 == 1))
        for i in range(scaled(NUM_COMPARE, drill.scale))
    ]
    return [*compare, *train, *save, *generate]  # the long ones first, so that no job waits for one at the end


def shuffled(items, rng):
    return rng.sample(items, len(items))


def train_killed(folder, rng, references, kind):
    run, flags = folder / "run", STREAM if kind == "stream" else []
    with Starts() as starts:

        def start(*more):
            if kind == "ranks":
                return starts.train_ranks(2, run, *flags, *more)
            return [starts.train(run, *flags, *more)]

        kill_within(references.seconds(kind), rng, start, lambda: forget(run))
        for _ in range(rng.randrange(MOST_KILLS)):
            kill_once(start(*RESUME), rng.uniform(0, references.seconds(kind)))
        for process in start(*RESUME):
            process.wait()
    check_same_run(run, references.get(kind))


def save_killed(folder, rng, references, point):
    """Killed at a chosen place of a save, at times again while it is resumed."""
    module, function, calls = point
    run = folder / "run"
    with Starts() as starts:
        for life in range(rng.choice([1, 1, 2])):
            call, after = rng.randint(1, calls), rng.random() < 0.5
            deadly = functools.partial(kill_at, module=module, function=function, call=call, after=after)
            start = starts.train(run, *(RESUME if life else []), tamper=deadly)
            start.wait(None)
            if start.process.exitcode not in (0, -9):
                raise Failed(f"exit status {start.process.exitcode} of a start that was to be killed", start.output)
        starts.train(run, *RESUME).wait()
    check_same_run(run, references.get("plain"))


def generate_killed(folder, rng, references, fmt):
    run, reference, seconds = folder / "run", references.get(fmt), references.seconds(fmt)
    pipeline = references.get("plain")
    with Starts() as starts:
        if rng.random() < 0.3:
            module, function, calls = rng.choice(WRITING_IMAGES)
            call, after = rng.randint(1, calls), rng.random() < 0.5
            deadly = functools.partial(kill_at, module=module, function=function, call=call, after=after)
            starts.generate(run, pipeline, fmt, tamper=deadly).wait(None)
        else:
            kill_within(seconds, rng, lambda: [starts.generate(run, pipeline, fmt)], lambda: forget(run))
        for _ in range(rng.randrange(MOST_KILLS)):
            kill_once([starts.generate(run, pipeline, fmt)], rng.uniform(0, seconds))
        starts.generate(run, pipeline, fmt).wait()
    check_same_images(run, reference)


def compare_killed(folder, rng, references, with_children):
    """Killed alone, or with the training that it has started; without its parent that goes on by itself."""
    need_extractor()
    run = folder / "run"
    with Starts() as starts:
        kill_within(
            references.seconds("compare"), rng, lambda: [starts.compare(run)], lambda: forget(run), with_children
        )
        starts.compare(run).wait(timeout=3 * TIMEOUT)
    check_comparison(run)


def kill_within(seconds, rng, start, undo, with_children=False):
    """Kill a start at a random moment of its duration; where it was faster than that, once more and sooner.

    Args:
        start: makes a new start: a list of processes.
        undo: deletes what a start that ended by itself has left.
    """
    latest = seconds
    for _ in range(ATTEMPTS):
        if kill_once(start(), rng.uniform(0, latest), with_children):
            return
        undo()
        latest *= 0.7
    raise Failed("always ended before it could be killed")


def kill_once(processes, seconds, with_children=False):
    """SIGKILL processes after so many seconds. Whether any was still running."""
    processes[-1].process.join(seconds)
    killed = [process.kill() for process in processes]
    if with_children:
        for process in processes:
            process.kill_all()
    ended_badly = [p for p in processes if p.process.exitcode not in (0, -9)]
    if ended_badly and not any(killed):
        raise Failed(f"exit status {ended_badly[0].process.exitcode} of a start that was to be killed",
                     ended_badly[0].output)  # fmt: skip
    return any(killed)


def forget(run):
    shutil.rmtree(run, ignore_errors=True)
