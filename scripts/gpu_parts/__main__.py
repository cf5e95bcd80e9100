"""The process of one part: python scripts/gpu_parts MODULE DEVICE SIZE SECONDS FILE. gpu_check.py starts it."""

import importlib
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from common_lib.cli import UserError, quiet_transformers, run_script, set_up_logging
from common_lib.devices import hardware_name, limit_cpu_threads, resolve_device
from common_lib.files import LineFile
from gpu_parts.report import Report
from training_lib.launch import end_with_parent


def main(argv: list[str] | None) -> int:
    module, device, size, seconds, path = argv or sys.argv[1:]
    end_with_parent("gpu_check.py is gone")
    set_up_logging()
    lines = LineFile(Path(path))
    report = Report(lines, device, size, float(seconds))
    try:
        resolve_device(device, "--device")
        import torch

        quiet_transformers()
        part = importlib.import_module(module)
        if device == "cuda":
            getattr(part, "before_cuda", lambda: None)()
        else:
            limit_cpu_threads()  # as a search does, and two parts may run at once
        report.machine(card=hardware_name(device), cuda=torch.version.cuda or "none")
        part.run(report)
    except UserError as error:
        lines.append({"mistake": str(error)})
    except ModuleNotFoundError as error:
        lines.append({"missing": str(error)})
    else:
        lines.append({"done": True})
        return 0
    finally:
        lines.close()
        logging.shutdown()
    return 2


if __name__ == "__main__":
    run_script(main)
