"""collect_rollouts.py with a simulated generator in the place of all models; all else but grading is the real script.

    python tests/simulated_collect.py --problems problems.jsonl --piref_model TINY --output_dir FOLDER ...

Without torch and transformers, so that it starts in a second. SIM_SECONDS is the mean time of a reply.
"""

import sys

import simulated_eval  # makes the project's files known

import collect_rollouts
from common_lib.cli import run_script


class PlainGrader:
    """Equal texts are equal."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    async def agrade(self, pairs):
        return [truth == answer for truth, answer in pairs]


if __name__ == "__main__":
    collect_rollouts.Grader = PlainGrader
    collect_rollouts.load_tokenizer = simulated_eval.PlainTokenizer
    collect_rollouts.make_engine = lambda name, config: simulated_eval.SimEngine()
    collect_rollouts.quiet_transformers = lambda: None
    run_script(lambda argv: collect_rollouts.main([*sys.argv[1:], "--engine", "transformers", "--device", "cpu"]))
