"""Two starts in one folder: the second is refused and told who is there; a start that was killed is in nobody's way."""

import functools
import os
import socket
import time

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
    check_refusal,
    check_same_images,
    check_same_run,
    need_extractor,
    scaled,
    slow_sampling,
    slow_steps,
    wait_for,
)

REPEATS = 2  # of each case but the comparisons
SLOW = 0.1  # seconds more a step, so that the second start meets the first


def cases(drill):
    """Each pair of starts, and each kind of killed one."""
    found = [
        *(Case(f"train, second {name}", bound(second_training, drill.references, flags)) for name, flags in SECOND),
        Case("train, both at once", bound(both_at_once, drill.references)),
        *(Case(f"generate {fmt}", bound(second_generation, drill.references, fmt)) for fmt in FORMATS),
        *(Case(f"after a kill, {kind}", bound(after_a_kill, drill.references, kind)) for kind in KILLED),
    ]
    found = [Case(f"{case.name} ({i})", case.check) for i in range(scaled(REPEATS, drill.scale)) for case in found]
    return [Case("compare", second_comparison), *found]


SECOND = (
    ("anew", []),
    ("by resuming", RESUME),
    ("by overwriting", ["--overwrite_output_dir"]),
    ("by resuming streamed", [*STREAM, *RESUME]),
)
KILLED = ("plain", "stream", "ranks", *FORMATS)


def check_told_who(second, first):
    """The second start's one line names the host and a process of the first."""
    check_refusal(second, socket.gethostname(), first.process.pid)


def second_training(folder, rng, references, flags):
    run = folder / "run"
    with Starts() as starts:
        first = starts.train(run, tamper=functools.partial(slow_steps, seconds=SLOW))
        begun = run / rng.choice(["training_options.yaml", "checkpoint-6"])  # in its set-up or later
        wait_for(begun.exists, begun.name, first)
        second = starts.train(run, *flags, log_path=folder / "second.log").wait(None)
        check_told_who(second, first)
        first.wait()
    check_same_run(run, references.get("plain"))


def both_at_once(folder, rng, references):
    """Exactly one of two starts wins; a random pause between them, shorter than their set-up."""
    run, slow = folder / "run", functools.partial(slow_steps, seconds=SLOW)
    with Starts() as starts:
        pair = [starts.train(run, tamper=slow, log_path=folder / "0.log")]
        time.sleep(rng.uniform(0, 0.3))
        pair.append(starts.train(run, tamper=slow, log_path=folder / "1.log"))
        codes = [start.wait(None).process.exitcode for start in pair]
    if codes.count(0) != 1:
        raise Failed(f"of two starts at once, {codes.count(0)} ended well", pair[1].output)
    winner = codes.index(0)
    check_told_who(pair[1 - winner], pair[winner])
    check_same_run(run, references.get("plain"))


def second_generation(folder, rng, references, fmt):
    run, pipeline = folder / "run", references.get("plain")
    with Starts() as starts:
        first = starts.generate(run, pipeline, fmt, tamper=functools.partial(slow_sampling, seconds=2 * SLOW))
        wait_for((run / "generation.json").exists, "generation.json", first)
        time.sleep(rng.uniform(0, 5 * SLOW))
        second = starts.generate(run, pipeline, fmt, log_path=folder / "second.log").wait(None)
        first.wait()
    check_told_who(second, first)
    check_same_images(run, references.get(fmt))


def second_comparison(folder, rng):
    need_extractor()
    run = folder / "run"
    with Starts() as starts:
        first = starts.compare(run)
        wait_for(lambda: list(run.glob("*.log")), "a run's log", first)
        second = starts.compare(run, log_path=folder / "second.log").wait(None, timeout=3 * TIMEOUT)
        first.wait(timeout=3 * TIMEOUT)
    check_told_who(second, first)
    check_comparison(run)


def after_a_kill(folder, rng, references, kind):
    """The next start comes at once, while workers of the killed one may still be there."""
    run = folder / "run"
    with Starts() as starts:
        killed = begin(starts, references, kind, run, slow=True)
        begun = run / ("generation.json" if kind in FORMATS else "checkpoint-6")
        wait_for(begun.exists, begun.name, killed[0])
        for start in killed:
            os.kill(start.process.pid, 9)
        for start in begin(starts, references, kind, run, slow=False):
            start.wait()
    (check_same_images if kind in FORMATS else check_same_run)(run, references.get(kind))


def begin(starts, references, kind, run, slow):
    """Starts of a kind of `References`, the first ones slowed down, the next ones resuming."""
    if kind in FORMATS:
        tamper = functools.partial(slow_sampling, seconds=SLOW) if slow else None
        return [starts.generate(run, references.get("plain"), kind, tamper=tamper)]
    tamper, flags = (functools.partial(slow_steps, seconds=SLOW), []) if slow else (None, RESUME)
    if kind == "ranks":
        return starts.train_ranks(2, run, *flags, tampers={0: tamper})
    return [starts.train(run, *flags, *(STREAM if kind == "stream" else []), tamper=tamper)]
