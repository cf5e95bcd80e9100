"""docs/run_files.md names every key that the files really have, and none that never occurs."""

import json
import re

import datasets
import kill_test
import numpy as np
import pyarrow as pa
import pytest
import simulated_eval
from conftest import ROOT
from rollouts import random_rows, write_rows
from tiny import save_generator

import inference_eval
import report
import train_classifier
from eval_lib.stopping import STOPS
from search_lib.run_reader import RESULT, ROUND, RunPaths
from training_lib.collection_folder import SCHEMA
from training_lib.evaluation import POSITIONS, _pair_metrics, _rollout_metrics


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, str]]:
    """By the words of a section (and of the table's head), backticked words of a row's first cell -> rest of the row."""
    found: dict[str, dict[str, str]] = {}
    section, head = "", ""
    for line in (ROOT / "docs/run_files.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if line.startswith("#"):
            section = line.strip("# ")
        elif not cells:
            head = ""
        elif not head:
            head = cells[0]
            rows = found.setdefault(f"{section} | {head}", {})
        elif not set(line) <= set("|-: "):
            for name in re.findall(r"`([^`]+)`", cells[0]):
                assert name not in rows, f"{section}: {name} is there twice"
                rows[name] = " ".join(cells[1:])
    return found


def table(tables, words):
    (name,) = [name for name in tables if words in name]
    return tables[name]


def words_of(text):
    return set(re.findall(r"`([^`]+)`", text))


# ---------------------------------------------------------------------------------------------------------------------
# A search run


@pytest.fixture(scope="module")
def search_run(tmp_path_factory):
    """A run of the search script whose models are simulated, begun twice."""
    folder = tmp_path_factory.mktemp("search")
    inputs, path = kill_test.make_inputs(folder, problems=2), folder / "run.jsonl"
    flags = [*inputs, "--num_repetitions", "2", "--max_length", "16", "--device", "cpu", "--output_path", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated_eval, "BLOCK_SECONDS", 0.001)
        for more in (["1"], ["2", "--stop", "sure"]):
            assert inference_eval.main([*flags, "--num_repetitions", *more], simulated_eval.LOADERS) == 0
    return RunPaths.of(path)


def keys_of(path):
    return set().union(*(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()))


def test_results(tables, search_run):
    documented = table(tables, "`X.jsonl`")
    assert set(documented) == keys_of(search_run.results) == RESULT.keys
    assert list(documented)[:10] == list(RESULT.required)  # the released code's
    assert list(json.loads(search_run.results.read_text().splitlines()[0])) == list(documented)


def test_journal(tables, search_run):
    assert set(table(tables, "`X.tree.jsonl`")) == keys_of(search_run.tree) == ROUND.keys


def test_settings_of_a_search(tables, search_run, tmp_path):
    documented = table(tables, "`X.meta.json`")
    meta = json.loads(search_run.meta.read_text())
    regraded = search_run.results.with_name("regraded.jsonl")
    assert report.main([str(search_run.results), "--regrade", str(regraded)]) == 0
    again = json.loads(RunPaths.of(regraded).meta.read_text())
    assert again.keys() - meta.keys() == {"regraded_from", "journal"}
    assert set(documented) == set(again)
    assert words_of(documented["search"]) - {"num_beams", "beam_width"} == set(meta["search"])
    assert words_of(documented["sessions"]) == set().union(*meta["sessions"])
    assert len(meta["sessions"]) == 2
    assert words_of(documented["numerics"]) == set(meta["numerics"])
    assert words_of(documented["reproducible"]) >= {*meta["reproducible"], meta["reproducible"]["values"]}
    assert words_of(documented["stopped_by"]) >= set(STOPS) - {"none"}
    assert words_of(documented["tokens_uncounted"]) >= set(meta["tokens_uncounted"])
    for model in ("generator", "value_model"):
        assert words_of(documented["generator"]) == set(meta[model])
    assert documented["generator"] == documented["value_model"]


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def training_run(tmp_path_factory):
    """Two steps of a tiny model, the last one evaluated and saved."""
    folder = tmp_path_factory.mktemp("training")
    save_generator(folder / "backbone")
    write_rows(folder / "data", random_rows(12))
    flags = (
        f"--model_path {folder}/backbone --data_path {folder}/data --data_num_response 4 --max_length 40 --num_steps 2 "
        f"--total_batch_size 8 --micro_batch_size 4 --eval_every 2 --eval_size 4 --save_dir {folder} --run_name run "
        "--device cpu --certify"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        assert train_classifier.main(flags.split()) == 0
    return folder / "run"


def test_metrics_of_training(tables, training_run):
    documented = table(tables, "`metrics.jsonl`")
    found = keys_of(training_run / "metrics.jsonl")
    steps = {name for name in found if not name.startswith("eval/")}
    assert set(documented) - {"eval/..."} == steps | {"mfu", "peak_memory_gb"}  # on GPUs only
    assert "known GPUs only" in documented["mfu"] and "on GPUs only" in documented["peak_memory_gb"]
    named = words_of(documented["eval/..."]) - {"--train_bt_model"}
    evaluated = {name.removeprefix("eval/") for name in found - steps}
    by_position = {name for name in named if name.endswith("_at_P")}
    assert {name.rpartition("_")[0] + "_P" for name in evaluated if "_at_" in name} <= by_position
    assert evaluated - {f"{name[:-1]}{p}" for name in by_position for p in POSITIONS} <= named


def test_a_certificate(tables, training_run):
    found = json.loads((training_run / "certificate.json").read_text())
    documented = table(tables, "key of `certificate.json`")
    assert set(documented) == set(found) | {"why"}  # of one that did not pass
    assert words_of(documented["distance"]) == set(found["distance"])


def test_every_measure_of_an_evaluation_is_named(tables):
    """Also those that exist only where there are right and wrong roll-outs to a problem, or with pairs."""
    arrays = {
        "value": np.array([0.1, 0.9, 0.2, 0.8]), "hit": np.array([True] * 4), "length": np.array([1] * 4),
        "correct": np.array([False, True, False, True]), "problem": np.array([0, 0, 1, 1]),
    }  # fmt: skip
    named = words_of(table(tables, "`metrics.jsonl`")["eval/..."]) - {"--train_bt_model"}
    plain = {f"{name.rpartition('_')[0]}_P" if "_at_" in name else name for name in _rollout_metrics(**arrays)}
    of_pairs = _pair_metrics(**{name: arrays[name] for name in ("value", "correct", "problem")})
    assert plain | {"loss"} | set(of_pairs) == named
    assert all(str(position) in table(tables, "`metrics.jsonl`")["eval/..."] for position in POSITIONS)


def test_a_checkpoint(tables, training_run):
    trainer = json.loads((training_run / "latest/trainer.json").read_text())
    documented = table(tables, "key of `trainer.json`")
    assert set(documented) == set(trainer)
    assert words_of(documented["data"]) == set(trainer["data"])
    files = {path.name for path in (training_run / "latest").iterdir()}
    named = set(table(tables, "A checkpoint | file"))
    assert named <= files
    assert all(name.startswith(("tokenizer", "chat_template")) for name in files - named)


# ---------------------------------------------------------------------------------------------------------------------
# Collection


def in_words(kind: pa.DataType) -> str:
    return f"list of {in_words(kind.value_type)}" if pa.types.is_list(kind) else str(kind).replace("float", "float32")


def test_columns_of_a_collected_data_set(tables):
    documented = table(tables, "A collected data set | column")
    assert list(documented) == SCHEMA.names
    for name, words in documented.items():
        assert words.startswith(f"{in_words(SCHEMA.field(name).type)} "), name
