"""What is known of a model folder before it is loaded, and the folders that are refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from common_lib.cli import UserError
from common_lib.models import (
    SAMPLE_BYTES,
    check_generator,
    check_positions,
    check_token_ids,
    check_value_cache,
    check_value_model,
    inspect_model,
    load_tokenizer,
    resolve_model,
    stop_token_ids,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    tiny.tiny_generator().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_shapes_are_those_of_the_weights(folder, tmp_path):
    info, model = inspect_model(folder, "--m"), tiny.tiny_generator()
    assert info.num_parameters == model.num_parameters()
    assert info.num_parameters_embedding == model.get_input_embeddings().weight.numel()
    assert info.has_lm_head and info.num_labels is None
    tiny.tiny_value_model(num_labels=1).save_pretrained(tmp_path / "value")
    value = inspect_model(tmp_path / "value", "--m")
    assert value.num_labels == 1 and not value.has_lm_head
    with pytest.raises(UserError, match=f"--roll_in_models {tmp_path}/value has no language-model head"):
        check_generator(value, "--roll_in_models")


def test_the_fingerprint_is_of_config_and_weights(folder):
    before = inspect_model(folder, "--m").fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))  # another order is the same config
    assert inspect_model(folder, "--m").fingerprint == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert inspect_model(folder, "--m").fingerprint != before


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_weights_that_are_cut_short_are_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"--m {path} is not a whole safetensors file; download or save it again"):
        inspect_model(folder, "--m")


def test_folders_that_are_no_model(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    info = inspect_model(folder, "--m")
    assert info.num_parameters is None and info.has_lm_head is None  # it cannot be told
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has no weights"):
        inspect_model(folder, "--m")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        inspect_model(folder, "--m")
    (folder / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(UserError, match="config.json has no hidden_size"):
        inspect_model(folder, "--m")


def test_looking_at_a_model_imports_no_torch(folder):
    code = (
        "import sys; from pathlib import Path; from common_lib.models import inspect_model\n"
        "inspect_model(Path(sys.argv[1]), '--m'); print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints, token ids, positions


def fingerprint(folder):
    return inspect_model(folder, "--m").fingerprint


def test_the_fingerprint_changes_with_weights_anywhere_with_config_and_with_names(tmp_path):
    """Of a file larger than what is read of it: its beginning, its end, its size, and places spread over it."""
    folder = tiny.save_generator(tmp_path / "model", vocab_size=20_000)
    path = folder / "model.safetensors"
    whole, found = path.read_bytes(), {fingerprint(folder)}
    spread = [(len(whole) - SAMPLE_BYTES) * part // 8 for part in range(9)]
    assert len(whole) > 20 * SAMPLE_BYTES
    for place in [-1, spread[1] + 5, spread[4], spread[7]]:
        other = bytearray(whole)
        other[place] ^= 1
        path.write_bytes(other)
        found.add(fingerprint(folder))
    path.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    found.add(fingerprint(folder))
    (folder / "config.json").write_text(json.dumps(config))
    path.rename(folder / "other.safetensors")
    found.add(fingerprint(folder))
    assert len(found) == 7


def test_every_shape_comes_from_its_own_line_of_the_config(tmp_path):
    changes = {"num_hidden_layers": 3, "hidden_size": 40, "intermediate_size": 52, "num_attention_heads": 8,
               "num_key_value_heads": 4, "vocab_size": 270, "max_position_embeddings": 512}  # fmt: skip
    tiny.tiny_generator(**changes).save_pretrained(tmp_path)
    info = inspect_model(tmp_path, "--m")
    assert {name: getattr(info, name) for name in changes} == changes
    assert (info.head_dim, info.tie_word_embeddings, info.path) == (5, False, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text()) | {"head_dim": 16, "tie_word_embeddings": True}
    del config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    info = inspect_model(tmp_path, "--m")
    assert (info.num_key_value_heads, info.head_dim, info.tie_word_embeddings) == (8, 16, True)


class Words:
    """A tokenizer, as far as it is looked at."""

    def __init__(self, eos=None, **vocabulary):
        self.eos_token_id, self.vocabulary = eos, vocabulary or {"a": 0, "b": 1}

    def get_vocab(self):
        return self.vocabulary


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ([7, 3], 5, 9, (3, 5, 7, 9)),
        (4, [4, 6], 4, (4, 6)),
        (None, None, 0, (0,)),
        (None, 0, None, (0,)),
        ([2], None, None, (2,)),
    ],
)
def test_stop_tokens_are_those_of_all_three_places(tmp_path, generation, config, tokenizer, expected):
    for name, value in (("generation_config", generation), ("config", config)):
        (tmp_path / f"{name}.json").write_text(json.dumps({} if value is None else {"eos_token_id": value}))
    assert stop_token_ids(tmp_path, Words(tokenizer)) == expected


def test_a_generator_that_never_ends_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    with pytest.raises(UserError, match="names no end-of-sequence token"):
        stop_token_ids(tmp_path, Words())


def test_generator_and_value_model_must_mean_the_same_tokens(tmp_path, caplog):
    generator = inspect_model(tiny.save_generator(tmp_path / "generator"), "--m")
    value = inspect_model(tiny.save_value_model(tmp_path / "value", tokenizer=False), "--m")

    def check(tokenizer, largest=0, theirs=None):
        check_token_ids(generator, value, tokenizer, largest, load=lambda path, flag: theirs)

    check(Words(), largest=263)
    assert "only sizes could be checked (largest id 263; embeddings: generator 264, value model 264)" in caplog.text
    for tokenizer, largest in ((Words(), 264), (Words(a=0, b=264), 0)):
        with pytest.raises(UserError, match="ids up to 264, but the value model .* has only 264 embeddings"):
            check(tokenizer, largest)
    (tmp_path / "value/vocab.json").touch()  # it has a tokenizer now
    check(Words(), theirs=Words(a=0, b=1, c=2))  # which may know more
    with pytest.raises(UserError, match=r"\(1 tokens differ: 'b' is 1 there and 2 here\)"):
        check(Words(), theirs=Words(a=0, b=2))
    with pytest.raises(UserError, match=r"\(1 tokens differ: 'b' is 1 there and nothing here\)"):
        check(Words(), theirs=Words(a=0))


def test_the_longest_trace_fits_the_positions_of_both(tmp_path):
    wide = inspect_model(tiny.save_generator(tmp_path / "wide", max_position_embeddings=100), "--m")
    narrow = inspect_model(tiny.save_generator(tmp_path / "narrow", max_position_embeddings=90), "--m")
    check_positions(wide, narrow, longest_prompt=30, max_length=60)
    for generator, value, who in ((wide, narrow, "value model"), (narrow, wide, "generator")):
        with pytest.raises(UserError, match=rf"91 tokens, more than the 90 positions of the {who} .*--max_length 60"):
            check_positions(generator, value, longest_prompt=30, max_length=61)


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 2), ("fp32", 4)])
def test_the_cache_holds_a_trace_and_its_copy(tmp_path, dtype, width):
    info = inspect_model(tiny.save_value_model(tmp_path / "value"), "--m")
    needed = 2 * 500 * (2 * 2 * 2 * 8) * width / 1e9  # two copies, keys and values, layers, heads, their size
    check_value_cache(needed, info, dtype, 500)
    check_value_cache("auto", info, dtype, 10**9)
    with pytest.raises(UserError, match=f"give at least {needed:.3g}"):
        check_value_cache(needed * 0.99, info, dtype, 500)


def test_heads_of_value_models(tmp_path):
    for labels in (1, 3):
        check_value_model(inspect_model(tiny.save_value_model(tmp_path / str(labels), num_labels=labels), "--m"))
    with pytest.raises(UserError, match="has a head of 2 labels; 3 or 1 are known"):
        check_value_model(replace(inspect_model(tmp_path / "3", "--m"), num_labels=2))
    with pytest.raises(UserError, match="has no value head"):
        check_value_model(inspect_model(tiny.save_generator(tmp_path / "generator"), "--m"))


def test_where_a_model_is(tmp_path, monkeypatch):
    folder = tiny.save_generator(tmp_path / "owner/model")
    assert resolve_model(str(folder), "--m") == folder
    for name, message in (
        (str(tmp_path), "has no config.json"), (str(folder / "config.json"), "is no folder"), ("a/b/c", "is no folder"),
        ("./model", "is no folder"), ("~/model", "is no folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--m {name} {message}"):
            resolve_model(name, "--m")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    assert resolve_model("owner/model", "--m") == folder and asked == ["owner/model"]
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/model", "--m") == Path("owner/model")  # a folder of that name comes first
    assert len(asked) == 1


def test_the_tokenizer_is_the_one_of_the_file(tmp_path):
    """Also where the config is Qwen2's, whose own pre-tokenizer would be put in its place."""
    folder = tiny.save_generator(tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ĠĠ"]
    made = Tokenizer(BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[("1", "2"), ("Ġ", "Ġ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    text = "Is  it 12345?"  # Qwen2's splits digits and spaces
    expected = made.encode(text).ids
    assert {256, 257} <= set(expected) and load_tokenizer(folder, "--m")(text).input_ids == expected
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"--m {folder}: its tokenizer cannot be loaded"):
        load_tokenizer(folder, "--m")
