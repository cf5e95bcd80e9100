"""Data sets of which a file is missing: named, and refused where it is known that it should be there."""

import json
import logging

import pytest
from rollouts import random_rows, write_rows
from tiny import save_generator

import train_classifier
from common_lib.cli import UserError
from training_lib.rollout_files import check_all_there, count_files, file_places, written_file


@pytest.fixture
def collection(tmp_path):
    """Twelve problems in files of two: file 1 has none that is solved, files 2 and 5 are not there."""
    folder = tmp_path / "rollouts"
    write_rows(folder / "data", random_rows(12), files=6)
    (folder / ".collect").mkdir()
    (folder / ".collect/settings.json").write_text(json.dumps({"num_problems": 12, "shard_size": 2}))
    for number in (1, 2, 5):
        (folder / f"data/train-{number:05d}-of-00006.parquet").unlink()
    (folder / ".collect/00001.empty").touch()
    return folder


def test_missing_files_of_a_collection_are_refused_by_name(collection):
    with pytest.raises(UserError) as error:
        check_all_there(str(collection))
    assert str(error.value) == (
        f"{collection} lacks train-00002-of-00006.parquet, train-00005-of-00006.parquet: its collection has not ended; finish "
        f"it with the collect_rollouts.py command that began it, or give {collection / 'data'} to go without"
    )
    for number in (0, 3, 4):
        (collection / f"data/train-{number:05d}-of-00006.parquet").unlink()
    with pytest.raises(
        UserError, match=r"lacks train-00000-of-00006\.parquet, .*, train-00003.*parquet and 2 more files: its"
    ):
        check_all_there(str(collection))


def test_a_whole_collection_and_what_is_none_are_not_spoken_of(collection, tmp_path, caplog):
    for number in (2, 5):
        (collection / f"data/train-{number:05d}-of-00006.parquet").touch()
    check_all_there(str(collection))
    check_all_there("owner/name")
    write_rows(tmp_path / "other", random_rows(4), files=2)
    (tmp_path / "other/more.parquet").touch()
    check_all_there(str(tmp_path / "other"))
    assert not caplog.records


def test_elsewhere_names_alone_tell_so_it_is_a_warning(collection, caplog):
    """Files may have been left out on purpose; whether one is kept apart is not known without the hidden folder."""
    elsewhere = collection.with_name("elsewhere")
    (collection / "data").rename(elsewhere)
    with caplog.at_level(logging.WARNING):
        check_all_there(str(elsewhere))
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{elsewhere} lacks train-00001-of-00006.parquet, train-00002-of-00006.parquet, "
        "train-00005-of-00006.parquet, as the names of the others say; going on without"
    )


def test_beside_the_hidden_folder_a_file_that_is_kept_apart_is_none_that_lacks(collection, monkeypatch, caplog):
    """FOLDER/data, which is what the refusal of FOLDER names."""
    with caplog.at_level(logging.WARNING):
        check_all_there(str(collection / "data"))
        (record,) = caplog.records
        assert f"{collection / 'data'} lacks train-00002-of-00006.parquet, train-00005" in record.getMessage()
        for number in (2, 5):
            (collection / f"data/train-{number:05d}-of-00006.parquet").touch()
        caplog.clear()
        check_all_there(str(collection / "data"))
        monkeypatch.chdir(collection / "data")
        check_all_there(".")
    assert not caplog.records


def test_places_of_files(tmp_path):
    assert [count_files(number, 5) for number in (1, 5, 6)] == [1, 1, 2]
    for place in file_places(tmp_path, 3, 7)[::-1]:
        place.parent.mkdir(exist_ok=True)
        place.touch()
        assert written_file(tmp_path, 3, 7) == place
    assert written_file(tmp_path, 2, 7) is None


def test_training_says_so_in_one_line(collection, tmp_path):
    """The script itself."""
    save_generator(tmp_path / "backbone")
    flags = [
        "--model_path",
        tmp_path / "backbone",
        "--data_path",
        collection,
        "--data_num_response",
        4,
        "--device",
        "cpu",
    ]
    flags += ["--max_length", 40, "--num_steps", 1, "--save_dir", tmp_path, "--run_name", "run"]
    with pytest.raises(
        UserError, match=r"lacks train-00002-of-00006\.parquet, train-00005-of-00006\.parquet: its"
    ) as error:
        train_classifier.main([str(word) for word in flags])
    assert "\n" not in str(error.value)
