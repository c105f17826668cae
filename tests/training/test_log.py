"""What a run says while it goes on."""

import sys

from conftest import REPOSITORY, forked


def test_where_there_is_no_terminal_each_record_is_a_line_and_no_bar_is_drawn(train):
    run = train("run", "--max_train_steps", 10, "--eval_batch_size", 0).wait()
    lines = [line for line in run.output.splitlines() if line.startswith("step ")]
    assert [line.partition(",")[0] for line in lines] == ["step 4/10", "step 8/10", "step 10/10"]
    assert all("loss 0." in line or "loss 1." in line for line in lines)
    assert "it/s" not in run.output
    assert "step/s" not in run.output


def test_help_has_the_options_under_their_headings():
    done = forked([sys.executable, REPOSITORY / "train_adaptive_ddpm.py", "--help"])
    assert done.returncode == 0, done.stderr
    sections = [section.partition(":\n")[::2] for section in done.stdout.split("\n\n")]
    flags = {heading.strip(): body for heading, body in sections}
    assert "--validation_split" in flags["Loss by timestep on held-out images"]
    assert "--ddpm_num_steps" in flags["Model and noise"]
    assert "--timestep_sampler" in flags["Method"]
    assert "--checkpointing_steps" in flags["Checkpoints"]
    assert sum("--seed" in body for body in flags.values()) == 1
