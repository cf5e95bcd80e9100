"""What a what-if costs: policies replayed on a synthetic run, in this process, on one core.

    python scripts/benchmark_replay.py                                             # 1,000 policies, 200 problems x 16
    python scripts/benchmark_replay.py --problems 30 --repetitions 64 --policies 400

The run is made by scripts/make_synthetic_run.py and read from its files as `report.py --what_if` reads it. CPU seconds are
those of this process; of the replay alone, and of all from the file to the table.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from make_synthetic_run import Options, make_synthetic_run

from common_lib.cli import ArgumentParser, check_rules, run_script
from eval_lib.grading import Grader
from report_lib.analysis import analyse
from report_lib.data import read_run
from report_lib.policies import GUARDED, VOTES, Policy, all_policies
from report_lib.replay import NUM_ORDERS, replay
from report_lib.what_if import policy_rows, recorded_problems


def make_policies(count: int, repetitions: int) -> list[Policy]:
    """So many different ones: those of every what-if, then stops of all kinds at many parameters and numbers."""
    found = dict.fromkeys(all_policies([], repetitions))
    step = 0
    while len(found) < count:
        step += 1
        share, most = round(step / (count + 1), 4), 2 + step % max(1, repetitions - 2)
        for vote in GUARDED:
            found[Policy(vote, "certified", share)] = None
            found[Policy(vote, "sure", most=most)] = None
        for vote in VOTES:
            found[Policy(vote, "beta", share, most)] = None
            found[Policy(vote, "esc", 1 + step % 4, most)] = None
    return list(found)[:count]


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=16)
    parser.add_argument("--policies", type=int, default=1000)
    args = parser.parse_args(argv)
    check_rules(args, [(name, getattr(args, name) >= 2, "must be at least 2") for name in vars(args)])
    policies = make_policies(args.policies, args.repetitions)
    options = Options(problems=args.problems, repetitions=args.repetitions, num_blocks=4, block_size=24, max_length=96)
    with tempfile.TemporaryDirectory() as folder, Grader() as grader:
        path = Path(folder) / "run.jsonl"
        make_synthetic_run(path, options)
        begin = time.process_time()
        analysis = analyse(read_run(path, "run"), grader)
        problems = list(recorded_problems(analysis, grader))
        start, clock = time.process_time(), time.perf_counter()
        replayed = replay(policies, problems)
        seconds, wall = time.process_time() - start, time.perf_counter() - clock
        rows = policy_rows(policies, replayed, set(), [problem.data_idx for problem in problems])
        whole = time.process_time() - begin
    print(
        f"{len(rows)} policies x {len(problems)} problems x {args.repetitions} repetitions x {1 + NUM_ORDERS} orders: replayed in "
        f"{seconds:.1f} CPU s ({wall:.1f} s), {whole:.1f} CPU s with reading"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
