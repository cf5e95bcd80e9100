"""Which engine: a table of names, each of which imports its engine only when it is chosen."""

import importlib.util
import logging
from collections.abc import Callable

from engine_lib.base import Engine, EngineConfig

logger = logging.getLogger(__name__)


def _sglang(config: EngineConfig) -> Engine:
    from engine_lib.sglang_local import SGLangEngine

    return SGLangEngine(config)


def _sglang_server(config: EngineConfig) -> Engine:
    from engine_lib.sglang_remote import SGLangServerEngine

    return SGLangServerEngine(config)


def _transformers(config: EngineConfig) -> Engine:
    from engine_lib.transformers_engine import TransformersEngine

    return TransformersEngine(config)


ENGINES: dict[str, Callable[[EngineConfig], Engine]] = {
    "sglang": _sglang,
    "sglang-server": _sglang_server,
    "transformers": _transformers,
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
    if name != "transformers" and config.samples and not config.deterministic:
        logger.warning("engine: SGLang ignores seeds without --deterministic: another run will sample other tokens")
    return ENGINES[name](config)
