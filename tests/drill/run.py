"""The drill: kill, starve, poison and mislead the scripts, and see that nothing is lost, half done or left unsaid.

    python tests/drill/run.py --output_dir runs/drill --record benchmarks/results/drill.json
    python tests/drill/run.py --output_dir runs/drill --record /tmp/drill.json --only kills bits --scale 0.05

Runs on the CPU, for about 20 minutes on two cores. A part's result is in the record as soon as the part ends; with
--only, the parts that the record has of the same commit, seed and scale stay. Exit status 1 if anything failed.
"""

import argparse
import importlib
import json
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDERS = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "drill")]
sys.path[:0] = FOLDERS
# The server that starts are forked from finds what it preloads by this, whatever folder the drill is called from.
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")

import torch  # noqa: E402
from harness import PRELOAD, Case, Drill, Failed, References, Skipped, bound, processes  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

PARTS = ("kills", "inputs", "disk", "nan", "bits", "processes", "locks")
MARK = ".drill"  # in --output_dir: what is there is ours to delete


def main(argv):
    options = read_options(argv)
    claim_folder(options.output_dir)
    processes.set_forkserver_preload(PRELOAD)
    references = References(options.output_dir / "references")
    references.folder.mkdir(exist_ok=True)
    record = open_record(options, argv)
    for part in options.only:
        record["parts"][part] = run_part(part, options, references)
        write_record(options.record, record)
    failed = sum(record["parts"][part]["failed"] for part in options.only)
    print(summary_of(record))
    return 1 if failed else 0


def read_options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the drill's runs go; failed ones stay.")
    parser.add_argument("--record", type=Path, required=True, help="JSON of the results.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="Parts to run; default: all.")
    parser.add_argument("--scale", type=float, default=1.0, help="Share of the trials.")
    parser.add_argument("--seed", type=int, default=0, help="Of moments, sizes, bits and bad inputs.")
    parser.add_argument("--jobs", type=int, default=2, help="Cases at the same time.")
    parser.add_argument("--cases", help="Only cases whose name contains this.")
    options = parser.parse_args(argv)
    options.output_dir = options.output_dir.resolve()
    return options


def claim_folder(folder):
    """Make the folder of the drill's runs, or make sure that it is one."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        sys.exit(f"--output_dir {folder}: is not empty, and not a folder of the drill")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def run_part(part, options, references):
    """All cases of a part, `--jobs` at a time: the part's entry in the record."""
    began = time.monotonic()
    folder = options.output_dir / part
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    drill = Drill(options.scale, random.Random(f"{options.seed} {part}"), references)
    cases = [case for case in cases_of(part, drill) if not options.cases or options.cases in case.name]
    results = []
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(cases), desc=part, unit="case") as bar:
        tasks = [pool.submit(run_case, case, folder / f"{i:03d}", options.seed) for i, case in enumerate(cases)]
        for task in as_completed(tasks):
            results.append(task.result())
            bar.update()
            bar.set_postfix(Counter(result["result"] for result in results))
    return part_record(results, time.monotonic() - began)


def cases_of(part, drill):
    """The part's cases; where not even the undisturbed runs that they need can be made, one that says so."""
    module = importlib.import_module(part)
    try:
        return module.cases(drill)
    except Failed as failure:
        return [Case("undisturbed runs", bound(give_up, failure))]


def give_up(folder, rng, failure):
    raise failure


def run_case(case, folder, seed):
    """One case: {"case", "result", and why}. Whatever goes wrong is a result, never the end of the drill."""
    folder.mkdir()
    began = time.monotonic()
    entry = {"case": case.name, "result": "passed"}
    try:
        case.check(folder, random.Random(f"{seed} {case.name}"))
    except Skipped as skipped:
        entry |= {"result": "skipped", "reason": str(skipped)}
    except Failed as failure:
        entry |= {"result": "failed", "reason": failure.reason, "evidence": failure.evidence, "folder": folder.name}
    except Exception as error:  # the product left something that the drill could not even look at
        reason = f"{type(error).__name__}: {error}"
        entry |= {"result": "failed", "reason": reason[:300], "evidence": traceback.format_exc()[-700:]}
    entry["seconds"] = round(time.monotonic() - began, 1)
    if entry["result"] != "failed":
        shutil.rmtree(folder, ignore_errors=True)
    return entry


def part_record(results, seconds):
    """Counts, the reasons of failures by how often they came, and each failure with its evidence."""
    by_result = {name: [r for r in results if r["result"] == name] for name in ("passed", "failed", "skipped")}
    return {
        "tried": len(results) - len(by_result["skipped"]),
        **{name: len(found) for name, found in by_result.items()},
        "reasons": dict(Counter(r["reason"] for r in by_result["failed"]).most_common()),
        "skip_reasons": dict(Counter(r["reason"] for r in by_result["skipped"]).most_common()),
        "failures": sorted(by_result["failed"], key=lambda entry: entry["case"]),
        "seconds": round(seconds, 1),
    }


# The record


def open_record(options, argv):
    """A new record, with the parts of an earlier one that tells of the same thing."""
    record = {
        "command": shlex.join(["python", "tests/drill/run.py", *argv]),
        "seed": options.seed,
        "scale": options.scale,
        "commit": commit(),
        "device": f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores, one thread a process",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "accelerate", "datasets", "hypothesis")},
        },
        "parts": {},
    }
    if options.record.exists():
        earlier = json.loads(options.record.read_text())
        if all(earlier.get(name) == record[name] for name in ("seed", "scale", "commit")):
            record["parts"] = earlier["parts"]
    return record


def commit():
    """The checkout's commit; with a plus where files that git knows have changed since."""
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    return head + ("+" if changed else "")


def write_record(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def summary_of(record):
    """A line for each part, and one for each reason of its failures."""
    lines = []
    for part, result in record["parts"].items():
        counts = ", ".join(f"{result[name]} {name}" for name in ("tried", "passed", "failed", "skipped"))
        lines.append(f"{part:10} {counts}; {result['seconds']:.0f} s")
        lines += [f"    {count:3} x {reason}" for reason, count in result["reasons"].items()]
        lines += [f"    {count:3} skipped: {reason}" for reason, count in result["skip_reasons"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
