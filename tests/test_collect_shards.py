"""collect_rollouts.py --shard I/N: the same files as from one process, whoever is killed, and nobody in another's way."""

import errno
import os
import re
import resource
import sys
from contextlib import closing
from pathlib import Path

import datasets
import pytest
from collect_spy import SpyGrader, collect, make_inputs, write_problems

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import kill_test

from common_lib.cli import UserError
from common_lib.shards import Shard
from engine_lib.base import EngineError
from training_lib.collection_folder import CollectionFolder, RollIns
from training_lib.rollout_data import load_rollouts


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Eleven problems: six parquet files of two, of one of which no problem is ever solved."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_problems(folder / "problems.jsonl", ["0", "1", "2", "never", "never", "never", "1", "2", "0", "1", "3"])
    return folder


def settings(inputs):
    return {"shard_size": 2, "roll_in_models": [inputs / "other", inputs / "policy"], "batch_size": 3}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What one process makes."""
    with pytest.MonkeyPatch.context() as patch:
        run = collect(patch.setattr, inputs, tmp_path_factory.mktemp("whole") / "out", **settings(inputs))
    return kill_test.files_of(run.folder)


def stop_after(patch, problems):
    """The power goes after so many problems have been graded."""
    graded, left = SpyGrader.agrade, [problems]

    async def agrade(self, pairs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyError("the power goes")
        return await graded(self, pairs)

    patch.setattr(SpyGrader, "agrade", agrade)


@pytest.fixture
def stopped(inputs, tmp_path, monkeypatch):
    """Shards 0 and 2 of three have ended, the first of them with nothing to say; shard 1 has stopped in its second file."""
    folder = tmp_path / "out"
    for shard in ("0/3", "1/3", "2/3"):
        with monkeypatch.context() as patch:
            if shard == "1/3":
                stop_after(patch, 3)
                with pytest.raises(KeyError):
                    collect(patch.setattr, inputs, folder, shard=shard, **settings(inputs))
            else:
                collect(patch.setattr, inputs, folder, shard=shard, **settings(inputs))
    assert sorted(path.name for path in folder.rglob("*.jsonl")) == ["roll_ins-00-00004.jsonl", "rows-00004.jsonl"]
    return folder


@pytest.mark.parametrize("rest", ["1/3", None, "0/2"])
def test_the_files_are_the_same_bytes_as_from_one_process(rest, inputs, whole, stopped, monkeypatch, capsys):
    """The stopped shard goes on with its own command, as one process for all, or as one of another number of shards."""
    assert not (stopped / "README.md").exists()
    run = collect(monkeypatch.setattr, inputs, stopped, shard=rest, **settings(inputs))
    assert [engine.config.model_path.rsplit("/", 1)[1] for engine in run.engines] == ["policy"]  # the other's are kept
    assert set(run.prompts) == {"9"}
    assert kill_test.files_of(stopped) == whole and len(whole) == 6 + 2  # settings and card
    assert ".collect/00002.empty" in whole
    assert "7 problems (4 without a success left out)" in capsys.readouterr().out


def test_the_last_shard_to_end_writes_the_card_and_the_others_say_who_does(
    inputs, whole, tmp_path, monkeypatch, capsys
):
    said = []
    for shard in ("2/3", "0/3", "1/3"):
        capsys.readouterr()
        run = collect(monkeypatch.setattr, inputs, tmp_path / "out", shard=shard, **settings(inputs))
        assert run.status == 0
        said.append(capsys.readouterr().out)
        assert (tmp_path / "out/README.md").exists() == (shard == "1/3")
        assert {int(group) // 2 % 3 for group in run.prompts} == {int(shard[0])}
    assert "shard 2/3 is done: 2 of 6 parquet files. 4 of other shards are not there yet" in said[0]
    assert "2 of other shards" in said[1] and "the shard that ends last writes the data card" in said[1]
    assert "next: train_classifier.py" in said[2]
    assert kill_test.files_of(tmp_path / "out") == whole
    (tmp_path / "out/README.md").unlink()
    again = collect(monkeypatch.setattr, inputs, tmp_path / "out", shard="0/3", **settings(inputs))
    assert not again.engines and kill_test.files_of(tmp_path / "out") == whole


def test_a_stopped_shard_tells_of_its_own_problems(inputs, tmp_path, monkeypatch, capsys):
    async def dead(self, pairs):
        raise EngineError("the engine is dead")

    monkeypatch.setattr(SpyGrader, "agrade", dead)
    run = collect(monkeypatch.setattr, inputs, tmp_path / "out", shard="2/3", **settings(inputs))
    assert run.status == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: the engine is dead (0 of 3 problems of shard 2/3 are done; the same command goes on)"


# ---------------------------------------------------------------------------------------------------------------------
# Killed between two steps, and begun by an older version


def die(*_):
    raise KeyError("the power goes")


def test_journals_that_a_kill_has_left_of_a_finished_file_are_removed(inputs, whole, tmp_path, monkeypatch):
    """A file stands as soon as it has its name; its journals go after that."""
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(CollectionFolder, "_remove_journals", die)
        collect(patch.setattr, inputs, tmp_path / "out", **settings(inputs))
    left = {path.name[-11:] for path in tmp_path.rglob("r*-*.jsonl")}
    assert any(path.name[6:11] + ".jsonl" in left for path in (tmp_path / "out/data").iterdir())
    collect(monkeypatch.setattr, inputs, tmp_path / "out", **settings(inputs))
    assert kill_test.files_of(tmp_path / "out") == whole


@pytest.fixture
def older(inputs, tmp_path, monkeypatch):
    """Stopped after some files: one journal has the roll-ins of all, finished ones too, and its last line is torn."""
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        stop_after(patch, 6)
        patch.setattr(CollectionFolder, "_remove_journals", lambda *_: None)
        collect(patch.setattr, inputs, tmp_path / "out", **settings(inputs))
    journals = sorted(tmp_path.glob("out/.collect/roll_ins-00-*.jsonl"))
    assert len(journals) == 6 and list(tmp_path.glob("out/data/*"))
    text = "".join(path.read_text() for path in journals)
    (tmp_path / "out/.collect/roll_ins-00.jsonl").write_text(text + '{"i": 10, "roll_')
    for path in journals:
        path.unlink()
    return tmp_path / "out"


@pytest.mark.parametrize("dies", [None, "RollIns.add", "fsync", "RollIns.close"])
def test_an_older_collection_keeps_its_roll_ins_wherever_their_split_is_killed(
    dies, inputs, whole, older, monkeypatch, caplog
):
    if dies:
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            adds = [2]

            def die_later(self, *what, add=RollIns.add):
                adds[0] -= 1
                return add(self, *what) if adds[0] >= 0 else die()

            patch.setattr(f"training_lib.collection_folder.{dies}", die_later if dies.endswith("add") else die)
            collect(patch.setattr, inputs, older, **settings(inputs))
        assert (older / ".collect/roll_ins-00.jsonl").exists()
    caplog.clear()
    with caplog.at_level("INFO"):
        run = collect(monkeypatch.setattr, inputs, older, **settings(inputs))
    assert [engine.config.model_path.rsplit("/", 1)[1] for engine in run.engines] == ["policy"]  # the other's are kept
    (said,) = [record.getMessage() for record in caplog.records if "roll_ins-00.jsonl: of an" in record.getMessage()]
    assert "are split into journals by file" in said
    assert kill_test.files_of(older) == whole


def test_a_shard_of_an_older_collection_is_told_to_split_it_first(inputs, older, monkeypatch):
    before = kill_test.files_of(older)
    with pytest.raises(
        UserError, match=r"roll_ins-00\.jsonl holds .*; start the command once without --shard"
    ) as error:
        collect(monkeypatch.setattr, inputs, older, shard="1/3", **settings(inputs))
    assert "\n" not in str(error.value) and kill_test.files_of(older) == before


# ---------------------------------------------------------------------------------------------------------------------
# Processes at once, and mistakes


FOLDER = {"num_problems": 11, "shard_size": 2, "keep_unsolved": True, "seed": 0}


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("1/3", "1/3", "another process is collecting shard 1/3 into {}; give --shard I/3 with another I, or wait"),
        ("1/3", "0/1", "another process is collecting shard 1/3 into {}; give --shard I/3 with another I, or wait"),
        ("0/1", "1/3", "another process is collecting into {}; give another --output_dir, or wait for its end"),
        ("0/1", "0/1", "another process is collecting into {}; give another --output_dir, or wait for its end"),
        ("0/2", "1/3", "another process is collecting shard 0/2 into {}; give --shard I/2 with another I, or wait"),
        ("0/2", "1/4", "another process is collecting shard 0/2 into {}; give --shard I/2 with another I, or wait"),
    ],
)
def test_processes_that_would_make_the_same_files_are_told(first, second, told, tmp_path):
    """Also two N that have no file in common: together they would leave some out."""
    held = CollectionFolder(tmp_path, FOLDER, Shard.parse(first, "--shard"))
    with pytest.raises(UserError, match=re.escape(told.format(tmp_path))) as error:
        CollectionFolder(tmp_path, FOLDER, Shard.parse(second, "--shard"))
    assert "\n" not in str(error.value)
    held.close()
    CollectionFolder(tmp_path, FOLDER, Shard.parse(second, "--shard")).close()  # what is left of the first is no lock


def test_the_same_on_a_file_system_without_locks(tmp_path, monkeypatch):
    """Lustre's default, say: files that are there while a shard is at work are the locks."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    held = CollectionFolder(tmp_path, FOLDER, Shard(0, 2))
    with pytest.raises(UserError, match="another process is collecting shard 0/2 into"):
        CollectionFolder(tmp_path, FOLDER, Shard(1, 3))
    with (
        closing(CollectionFolder(tmp_path, FOLDER, Shard(1, 2))) as beside,
        pytest.raises(UserError, match="shard 1/2 into"),
    ):
        assert beside.files == [1, 3, 5]
        CollectionFolder(tmp_path, FOLDER, Shard(1, 2))
    held.close()
    CollectionFolder(tmp_path, FOLDER, Shard(1, 3)).close()


def test_shards_of_one_number_work_side_by_side(tmp_path):
    shards = [CollectionFolder(tmp_path, FOLDER, Shard(index, 3)) for index in range(3)]
    assert [shard.files for shard in shards] == [[0, 3], [1, 4], [2, 5]]
    assert [shard.missing() for shard in shards] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10]]
    assert [shard.num_mine for shard in shards] == [4, 4, 3]
    with pytest.raises(UserError, match="was begun with other settings: seed was 0, is 1; give another --output_dir"):
        CollectionFolder(tmp_path, FOLDER | {"seed": 1}, Shard(1, 3))
    for shard in shards:
        shard.close()


def test_one_process_may_finish_what_hundreds_of_shards_have_begun(tmp_path):
    """It has a journal open for each parquet file: more than many systems allow unless they are asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        folder = CollectionFolder(tmp_path, FOLDER | {"num_problems": 60, "shard_size": 1})
        assert folder.num_files == 60 and len(folder.missing()) == 60
        folder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("shard", "told"),
    [
        ("3/3", "--shard '3/3' must be I/N with 0 <= I < N"),
        ("1", "--shard '1' must be I/N"),
        ("", "--shard '' must be I/N"),
        ("0/7", "--shard 0/7: 11 problems make 6 parquet files of --shard_size 2, too few for 7 shards; give N <= 6"),
    ],
)
def test_a_shard_that_cannot_be_is_one_line_before_anything_is_made(shard, told, inputs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        collect(monkeypatch.setattr, inputs, tmp_path / "out", shard=shard, **settings(inputs))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_another_seed_than_the_other_shards_is_told_by_name(inputs, stopped, monkeypatch):
    with pytest.raises(UserError, match=r"was begun with other settings: seed was 3, is 4; give another --output_dir"):
        collect(monkeypatch.setattr, inputs, stopped, shard="1/3", seed=4, **settings(inputs))


def test_the_documentation_names_every_file_beside_the_data(stopped):
    text = (kill_test.ROOT / "docs/run_files.md").read_text(encoding="utf-8")
    rows = text[text.index("| file of `.collect/` |") :].split("\n\n")[0].splitlines()[2:]
    documented = {re.sub(r"\d+", "0", row.split("`")[1]) for row in rows}
    assert documented == {re.sub(r"\d+", "0", path.name) for path in (stopped / ".collect").iterdir()}


def test_training_on_a_collection_that_has_not_ended_names_the_missing_file(stopped):
    with pytest.raises(UserError, match="lacks train-00004-of-00006.parquet: its collection has not ended") as error:
        load_rollouts(str(stopped), vocab_size=264, max_length=200, num_response=12)
    assert "\n" not in str(error.value)


def test_killed_in_the_middle_while_the_others_run(tmp_path, capsys):
    """SIGKILL of one of three real processes, at a random moment, one to three times."""
    assert kill_test.collect_trials(1, problems=6, seed=os.getpid(), folder=tmp_path) == 0
    assert "1 collections in 3 shards" in capsys.readouterr().out
