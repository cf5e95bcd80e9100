"""What is known of a model folder before it is loaded, and the folders that are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from common_lib.cli import UserError
from common_lib.models import check_generator, inspect_model

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
