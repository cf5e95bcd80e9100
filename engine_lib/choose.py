"""Which engine: a table of names, each of which imports its engine only when it is chosen."""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from engine_lib.base import Engine, EngineConfig
from engine_lib.value_base import ValueConfig, ValueEngine

logger = logging.getLogger(__name__)


def _late(module: str, engine: str) -> Callable[[Any], Any]:
    return lambda config: getattr(importlib.import_module(module), engine)(config)


ENGINES: dict[str, Callable[[EngineConfig], Engine]] = {
    "sglang": _late("engine_lib.sglang_local", "SGLangEngine"),
    "sglang-server": _late("engine_lib.sglang_remote", "SGLangServerEngine"),
    "transformers": _late("engine_lib.transformers_engine", "TransformersEngine"),
}
# Of value models that are not run in this process's own threads.
VALUE_ENGINES: dict[str, Callable[[ValueConfig], ValueEngine]] = {
    "sglang": _late("engine_lib.sglang_value_local", "SGLangValueEngine"),
    "sglang-server": _late("engine_lib.sglang_value_remote", "SGLangValueServers"),
}


def choose_engine(name: str) -> str:
    """The engine's name for `auto`: sglang where it is installed, else transformers, which is said loudly."""
    if name != "auto":
        return name
    if importlib.util.find_spec("sglang") is not None:
        return "sglang"
    logger.warning("engine: sglang is not installed; using transformers' generate, which is much slower on a GPU")
    return "transformers"


def make_engine(name: str, config: EngineConfig) -> Engine:
    """The engine of that name. Raises UserError for settings that cannot be, EngineError where it does not start."""
    if config.gpu_share_given and name != "sglang":
        instead = (
            "start the servers with --mem-fraction-static" if name == "sglang-server" else "it takes what it needs"
        )
        logger.warning(
            "engine: --piref_gpu_util %g has no effect with --engine %s: %s", config.gpu_share, name, instead
        )
    if name == "transformers" and config.seeded:
        logger.info("engine: --seeded changes nothing here: transformers' generate always draws by the requests' seeds")
    if name != "transformers" and config.samples and not (config.deterministic or config.seeded):
        logger.warning("engine: SGLang ignores seeds without --seeded: a second run will sample other tokens")
    return ENGINES[name](config)


def make_value_engine(name: str, config: ValueConfig) -> ValueEngine:
    """The served value model of that name. Raises UserError for settings that cannot be and for another model,
    EngineError where it does not start."""
    return VALUE_ENGINES[name](config)
