"""The program of a grading worker: it answers `eval_lib.grading` about pairs of answers, with math-verify.

A process of its own because math-verify's timeouts use signals, because a hard expression can hang or exhaust memory in
C code, and because a search must not wait for it. It imports nothing of this project.
"""

import contextlib
import faulthandler
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product
from typing import Any

MATH_MARK = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")  # text that holds mathematics, rather than being it
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_NAMED_COMMAS = re.compile(r"[A-Za-z]\s*=\s*[+-]?(?:\\\$)?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?![\d.])[^,\d]*", re.ASCII)
STEP_SECONDS = 5  # for one parse or one comparison; math-verify needs whole seconds (0.5 makes equal answers unequal)
WORKER_BYTES = 4 << 30  # address space of a worker: 10^{10^{10}} must not take the machine's memory


@lru_cache(maxsize=4096)
def _readings(text: str) -> list[Any]:
    """What math-verify reads in an answer: SymPy expressions and strings. Raises its TimeoutException."""
    from math_verify import parse

    def read(text: str) -> list[Any]:
        with contextlib.suppress(Exception):
            return parse(text, parsing_timeout=STEP_SECONDS, raise_on_error=True)
        return []

    # Bare LaTeX must be wrapped: unwrapped, only the 8 of `8\sqrt{10}` is found.
    readings = read(text) if MATH_MARK.search(text) else read(f"${text}$")
    if not readings or _DECIMAL_COMMA.fullmatch(text):  # `1,5` is two numbers or a decimal
        readings = readings + read(text)
    if _NAMED_COMMAS.fullmatch(text):  # `x=100,200` is two solutions or a number
        readings = readings + read(f"${text.replace(',', '')}$")
    if text.count(r"\pm") == 1:  # it reads `1 \pm x`, but not `\frac{1 \pm x}{2}`
        signs = [text.replace(r"\pm", one).replace(r"\mp", other) for one, other in ("+-", "-+")]
        readings = readings + read(f"${', '.join(signs)}$") * (not MATH_MARK.search(text))
    return readings


def _equal(gold: str, answer: str) -> bool:
    """Is any reading of `answer` equal to any of `gold`? Raises TimeoutException where only time could tell."""
    from math_verify import verify
    from math_verify.errors import TimeoutException

    late: TimeoutException | None = None
    for one, other in product(_readings(gold), _readings(answer)):
        try:
            # An interval equals its inequality, whichever of them is the truth.
            if verify(one, other, allow_set_relation_comp=True, timeout_seconds=STEP_SECONDS, raise_on_error=True):
                return not _differ(_numbers(gold), _numbers(answer))
        except TimeoutException as error:
            late = error
        except Exception:  # not comparable, such as a matrix and a number
            continue
    if late:
        raise late
    return False


def _numbers(text: str) -> list[float]:
    r"""The sorted numbers of an answer that is one plain number, or an interval, set or tuple of such; [] for all else.

    Where two answers both have such numbers, and these differ, no rule of math-verify makes the answers equal.
    """
    from math_verify.utils import timeout
    from sympy import Eq, Expr, FiniteSet, Interval, MatrixExpr, Tuple, UnevaluatedExpr

    def leaves(expression: Any) -> list[float]:
        if isinstance(expression, (FiniteSet, Tuple)):
            return [number for part in expression.args for number in leaves(part)]
        if isinstance(expression, Interval):
            return leaves(expression.start) + leaves(expression.end)
        if isinstance(expression, Eq) and expression.lhs.is_Symbol:  # N = 204
            return leaves(expression.rhs)
        is_number = isinstance(expression, Expr) and not isinstance(expression, MatrixExpr)
        if not is_number or expression.has(UnevaluatedExpr):  # 42 % equals 42 and 0.42
            raise TypeError
        number = timeout(STEP_SECONDS)(expression.evalf)(15)
        most = sys.float_info.max
        return [max(-most, min(most, float(number))) if number.is_finite else float(number)]

    expressions = [reading for reading in _readings(text) if not isinstance(reading, str)]
    with contextlib.suppress(TypeError, ValueError):  # symbols, relations, complex numbers
        numbers = sorted(leaves(expressions[0])) if len(expressions) == 1 else []
        return numbers if all(map(math.isfinite, numbers)) else []
    return []


def _differ(one: list[float], other: list[float]) -> bool:
    """Do plain numbers of two answers (`_numbers`) differ? math-verify rounds to 6 decimals, which of a small number is
    next to nothing: .000067 is not .0000672.
    """
    close = partial(math.isclose, rel_tol=1e-5, abs_tol=1e-12)
    return bool(one and other) and (len(one) != len(other) or not all(map(close, one, other)))


def serve(equal: Callable[[str, str], bool] = _equal, numbers: Callable[[str], list[float]] = _numbers) -> None:
    """One JSON request a line on stdin, one JSON reply a line on stdout, until stdin ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # nothing that a library prints may mix with the replies
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has or allows this limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    from math_verify.errors import TimeoutException

    replies.write(b'"ready"\n')
    os.dup2(nowhere, 2)  # nobody reads stderr from here on, and a full pipe would block
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # Ends this process even from inside C code, and when the parent is gone.
        faulthandler.dump_traceback_later(request["seconds"], exit=True, file=nowhere)
        reply: dict[str, object]
        try:
            answers = request["answers"]
            reply = {"result": equal(*answers) if request["do"] == "equal" else numbers(*answers)}
        except TimeoutException:
            reply = {"failure": "took too long"}
        except Exception as error:  # RecursionError, MemoryError, and what SymPy did not foresee
            reply = {"failure": f"failed ({type(error).__name__})"}
        faulthandler.cancel_dump_traceback_later()
        replies.write(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    serve()
