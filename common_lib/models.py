"""What can be known of a model folder without loading it: shapes, head, fingerprint, token ids, positions."""

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common_lib.cli import UserError, hub_errors

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class ModelInfo:
    """Shapes of a Qwen2-like checkpoint as its config and weight headers give them; sizes in numbers, not bytes."""

    path: str
    fingerprint: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_parameters: int | None  # None: the weights are not safetensors
    num_parameters_embedding: int | None
    num_labels: int | None  # of the value head; None: there is no head
    has_lm_head: bool | None  # None: cannot be told

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of one token's keys and values in all layers; `itemsize` of a number."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize


def resolve_model(name: str, flag: str) -> Path:
    """The folder of a model: a local one, or the hub's, downloaded. Raises UserError."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{flag} {name} has no config.json; give the folder of a model in Hugging Face format")
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{flag} {name} is no folder; give a model folder or a name on the hub such as owner/model")
    import huggingface_hub

    with hub_errors(f"{flag} {name}"):
        return Path(
            huggingface_hub.snapshot_download(name, ignore_patterns=["*.pth", "*.gguf", "*.onnx", "original/*"])
        )


def inspect_model(path: Path, flag: str) -> ModelInfo:
    """Read config and weight headers of a model folder. Raises UserError naming what is wrong."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{flag} {path}: config.json is not JSON ({error})") from error
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
             "max_position_embeddings")  # fmt: skip
    if missing := [name for name in names if name not in config]:
        raise UserError(f"{flag} {path}: config.json has no {missing[0]}; a Qwen2-like language model is needed")
    shapes = _weight_shapes(path, flag)
    heads = config["num_attention_heads"]
    embedding = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
    return ModelInfo(
        path=str(path),
        fingerprint=_fingerprint(path, config),
        **{name: config[name] for name in names},
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        num_parameters=sum(map(math.prod, shapes.values())) if shapes else None,
        num_parameters_embedding=sum(map(math.prod, embedding)) if shapes else None,
        num_labels=shapes["score.2.weight"][0] if "score.2.weight" in shapes else None,
        has_lm_head=("lm_head.weight" in shapes or bool(config.get("tie_word_embeddings"))) if shapes else None,
    )


def _weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def _weight_shapes(path: Path, flag: str) -> dict[str, list[int]]:
    """Shape of each tensor of the safetensors files, which must be whole; empty where the weights are not safetensors."""
    from safetensors import SafetensorError, safe_open

    files = _weight_files(path)
    if not files:
        raise UserError(f"{flag} {path} has no weights (no *.safetensors and no pytorch_model*.bin)")
    shapes: dict[str, list[int]] = {}
    for file in files if files[0].suffix == ".safetensors" else ():
        try:
            with safe_open(file, framework="np") as weights:
                shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{flag} {file} is not a whole safetensors file; download or save it again") from error
    return shapes


def _fingerprint(path: Path, config: dict[str, Any]) -> str:
    """sha256 over the config and, for each weight file, its size, its first 64 KiB (which hold the header's names and
    shapes) and 64 KiB at eight places spread over it: another checkpoint shows, at the cost of a few reads."""
    digest = hashlib.sha256(b"vgs-fingerprint-1")
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in _weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for part in range(9):
                stream.seek(max(0, size - SAMPLE_BYTES) * part // 8)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------------
# Do generator and value model fit each other and the run?


def load_tokenizer(path: Path, flag: str) -> Any:
    """The tokenizer of a model folder, exactly as its tokenizer.json says. Raises UserError.

    Where there is a tokenizer.json AutoTokenizer is avoided: for a local folder whose config says `qwen2` it puts Qwen2's
    own pre-tokenizer in the place of the file's (transformers 5.19).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(path)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{flag} {path}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error


def stop_token_ids(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """All end-of-sequence ids: the generation config's, the config's (SGLang stops at both), and the tokenizer's."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            eos = json.loads((path / name).read_text(encoding="utf-8")).get("eos_token_id")
            found |= set(eos if isinstance(eos, list) else [eos])
    found.discard(None)
    if not found:
        raise UserError(f"the generator {path} names no end-of-sequence token: no search could ever finish a trace")
    return tuple(sorted(found))


def check_generator(info: ModelInfo, flag: str = "--piref_model") -> None:
    """A generator needs a language-model head."""
    if info.has_lm_head is False or info.num_labels is not None:
        raise UserError(f"{flag} {info.path} has no language-model head, so it cannot generate; give a causal model")


def check_value_model(info: ModelInfo) -> None:
    """A value model needs a head of 3 labels or 1."""
    if info.num_parameters is not None and info.num_labels is None:
        raise UserError(
            f"--classifier_ckpt_path {info.path} has no value head (no score.2.weight): its values would be random; "
            "give a value model such as VGS-AI/DeepSeek-VM-1.5B or one made by train_classifier.py"
        )
    if info.num_labels not in (None, 1, 3):
        raise UserError(f"--classifier_ckpt_path {info.path} has a head of {info.num_labels} labels; 3 or 1 are known")


def check_token_ids(generator: ModelInfo, value: ModelInfo, tokenizer: Any, largest_id: int, load: Any) -> None:
    """Generator and value model must mean the same by a token id. Raises UserError with the first differences."""
    largest = max(largest_id, *tokenizer.get_vocab().values())
    if largest >= value.vocab_size:
        raise UserError(
            f"the generator uses token ids up to {largest}, but the value model {value.path} has only "
            f"{value.vocab_size} embeddings; both must share one tokenizer"
        )
    folder = Path(value.path)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        logger.warning(
            "the value model %s has no tokenizer: only sizes could be checked (largest id %d; embeddings: generator %d,"
            " value model %d), not that the ids mean the same",
            value.path, largest, generator.vocab_size, value.vocab_size,
        )  # fmt: skip
        return
    ours, theirs = tokenizer.get_vocab(), load(folder, "--classifier_ckpt_path").get_vocab()
    different = sorted((i, token) for token, i in ours.items() if theirs.get(token) != i)
    if different:
        shown = "; ".join(
            f"{token!r} is {i} there and {theirs.get(token, 'nothing')} here" for i, token in different[:3]
        )
        raise UserError(
            f"generator and value model have different tokenizers ({len(different)} tokens differ: {shown}); "
            "take a value model trained on this generator's tokens"
        )


def check_positions(generator: ModelInfo, value: ModelInfo, longest_prompt: int, max_length: int) -> None:
    """The longest trace must fit both models' positions."""
    total = longest_prompt + max_length
    for who, info in (("generator", generator), ("value model", value)):
        if total > info.max_position_embeddings:
            raise UserError(
                f"the longest prompt ({longest_prompt} tokens) and --max_length {max_length} make {total} tokens, more "
                f"than the {info.max_position_embeddings} positions of the {who} {info.path} (generator "
                f"{generator.max_position_embeddings}, value model {value.max_position_embeddings}); give --max_length "
                f"{info.max_position_embeddings - longest_prompt} at most"
            )


def check_value_cache(cache_gb: float | str, info: ModelInfo, dtype: str, trace: int, models: int = 1) -> None:
    """The cache must hold one whole trace and a working copy of it, for each of the `models` that share it."""
    needed = models * 2 * trace * info.kv_bytes(2 if dtype == "bf16" else 4) / 1e9
    if cache_gb != "auto" and float(cache_gb) < needed:
        raise UserError(
            f"--value_cache_gb {cache_gb} cannot hold one trace of {trace} tokens and a working copy; give at least "
            f"{needed:.3g}"
        )
