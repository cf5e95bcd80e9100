"""Say what search runs showed: tables, comparisons, plots and a page to look inside a search, from output files alone.

    # the table, in the terminal
    python report.py runs/vgs.jsonl
    # and report/report.html, plots, table.md, table.csv, table.json
    python report.py runs/vgs.jsonl --out report
    # several runs: each is compared with the first one, paired by problem
    python report.py runs/vgs.jsonl runs/bon.jsonl --out report
    # the same, renewed while the run goes on; an open page stays where it is
    python report.py runs/vgs.jsonl --out report --watch
    # a file of the released code
    python report.py inference_outputs.jsonl --num_blocks 8 --out report \\
        --tokenizer deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
    # what would have been spent and answered, had a finished run been stopped earlier
    python report.py runs/vgs.jsonl --what_if --policy weighted:sure --policy weighted:certified:0.05
    # grade again, into a new file
    python report.py runs/vgs.jsonl --regrade runs/vgs_regraded.jsonl

No model and no GPU is needed. A run in progress is reported as far as it is. The page opens from the file, without a
network.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common_lib.cli import ArgumentParser, UserError, hub_errors, run_script, set_up_logging
from common_lib.files import OutputError
from common_lib.progress import Progress
from eval_lib.grading import Grader
from report_lib.analysis import Analysis, analyse
from report_lib.answer import first_screen
from report_lib.compare import common_problems, compare
from report_lib.data import RunRecord, read_run, run_names
from report_lib.page import Decode, PageWriter
from report_lib.policies import GRAMMAR, Policy, parse_policy
from report_lib.problem import ProblemView
from report_lib.regrade import regrade
from report_lib.tables import all_tables, terminal_text, write_tables
from report_lib.watch import Draw, draw_aside, watch
from report_lib.what_if import check_what_if, what_if


def parse_args(argv: Sequence[str] | None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN.jsonl", help="output files; the others are compared with the first")
    add("--out", type=Path, metavar="FOLDER", help="write report.html, plots and tables there (made if need be)")
    add(
        "--num_blocks",
        type=int,
        help="blocks in parallel of one search, for runs without settings (the released code's)",
    )
    add(
        "--tokenizer",
        metavar="FOLDER_OR_NAME",
        help="text for runs without a journal: shown instead of ids, and for --regrade",
    )
    add("--all_rows", action="store_true", help="print a row for every number of repetitions, and whole comparisons")
    add("--regrade", type=Path, metavar="NEW.jsonl", help="grade RUN.jsonl again into this new file; says what changed")
    add("--what_if", action="store_true", help="replay policies on one finished run: what each would cost and answer")
    add(
        "--policy",
        action="append",
        default=[],
        metavar="VOTE[:STOP][@NUMBER]",
        help=f"a policy of --what_if that was chosen beforehand, repeatable; all others are exploratory: {GRAMMAR}",
    )
    add("--watch", action="store_true", help="renew the report in --out while the runs go on; Ctrl-C ends it")
    args = parser.parse_args(argv)
    if args.num_blocks is not None and args.num_blocks < 1:
        raise UserError(f"--num_blocks is {args.num_blocks}; it must be at least 1")
    if args.regrade and (len(args.runs) > 1 or args.out):
        raise UserError("--regrade takes one run and no --out; report the new file afterwards")
    if args.what_if and (args.watch or args.regrade):
        raise UserError("--what_if takes a finished run as it is, without --watch or --regrade")
    if args.policy and not args.what_if:
        raise UserError("--policy is of --what_if; give that too")
    args.policy = list(map(parse_policy, args.policy))
    if args.watch and not args.out:
        raise UserError("--watch renews a page; give its folder by --out")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; give a folder")
    return args


def load_decoder(name: str | None) -> Decode | None:
    """A tokenizer's `decode`. Raises UserError where it cannot be loaded."""
    if name is None:
        return None
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"--tokenizer {name} is no folder; give a tokenizer's folder or a name on the hub")
    from transformers import AutoTokenizer

    with hub_errors(f"--tokenizer {name}"):
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except ValueError as error:
            raise UserError(f"--tokenizer {name} is not a tokenizer ({error})") from error

    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def main(argv: Sequence[str] | None = None) -> int:
    set_up_logging()
    args = parse_args(argv)
    with file_errors(args.out):
        if args.regrade:
            show(regrade(args.runs[0], args.regrade, partial(load_decoder, args.tokenizer)))
            return 0
        runs = [] if args.watch else read_runs(args)
        if args.what_if:
            check_what_if(runs, args.policy)
        policies = args.policy if args.what_if else None
        decode = load_decoder(args.tokenizer)
        if args.out:
            from report_lib.plots import write_plots  # imports matplotlib, which takes a second

            if args.watch:
                write = partial(
                    write_report, args.out, decode=decode, draw=draw_aside(write_plots), all_rows=args.all_rows
                )
                show(watch(args.runs, args.out, partial(read_runs, args), write))
            else:
                show(write_report(args.out, runs, decode, write_plots, all_rows=args.all_rows, policies=policies))
        else:
            show(terminal_text(*analyse_all(runs, policies=policies), args.all_rows))
    return 0


@contextlib.contextmanager
def file_errors(out: Path | None) -> Iterator[None]:
    """Turn what becomes of a file that cannot be read or written into a UserError. out: for errors that name none."""
    try:
        yield
    except OutputError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be used ({error.strerror or error})") from error


def read_runs(args: Any) -> list[RunRecord]:
    """All runs, each of which shares problems with the first."""
    names = run_names(args.runs)
    with file_errors(args.out):
        runs = [read_run(path, name, args.num_blocks) for path, name in zip(args.runs, names, strict=True)]
    for other in runs[1:]:
        common_problems(runs[0], other)
    return runs


def analyse_all(
    runs: Sequence[RunRecord], page: PageWriter | None = None, policies: Sequence[Policy] | None = None
) -> tuple[list[Analysis], list[dict[str, Any]]]:
    """One pass over each run, and comparisons with the first; a page's data files are written on the way.

    policies: chosen beforehand, of a what-if; None where there is none.
    """
    total, done = sum(len(run.by_problem) for run in runs), 0
    progress = Progress(lambda: f"{done} of {total} problems read")

    def step(number: int, view: ProblemView) -> None:
        nonlocal done
        if page:
            page.add(number, view)
        done += 1
        progress.update()

    with Grader() as grader:
        analyses = [analyse(run, grader, partial(step, number)) for number, run in enumerate(runs)]
        if policies is not None:
            analyses[0].what_if = what_if(analyses[0], policies, grader)
    if sys.stderr.isatty():
        progress.close()
    return analyses, [compare(analyses[0], other) for other in analyses[1:]]


def write_report(
    folder: Path,
    runs: Sequence[RunRecord],
    decode: Decode | None,
    draw: Draw,
    live: int = 0,
    all_rows: bool = False,
    policies: Sequence[Policy] | None = None,
) -> str:
    """All files of a report; returns its text. Where it fails, an earlier report in the folder is still whole.

    live: version of a page that will be renewed. policies: of a what-if, see `analyse_all`.
    """
    with file_errors(folder):
        page = PageWriter(folder, decode, live)
        try:
            analyses, comparisons = analyse_all(runs, page, policies)
            write_tables(folder, analyses, comparisons)
            plots = draw(folder, analyses)
            page.finish(analyses, all_tables(analyses, comparisons), plots, first_screen(analyses, comparisons))
        except BaseException:
            page.discard()
            raise
    files = ["table.md", "table.csv", "table.json", *["what_if.csv"] * (policies is not None)]
    written = f"wrote {folder / 'report.html'}, {len(plots)} plots, {', '.join(files)}"
    return f"{terminal_text(analyses, comparisons, all_rows)}\n\n{written}"


def show(text: str) -> None:
    """Print, also into a pipe that is closed early (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is quiet


if __name__ == "__main__":
    run_script(main)
