"""`tether store`: what each verb says and does, and how it refuses."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from test_cli import Run, own_cache, recipe, start, tether  # noqa: F401

from tether.cli.store import HELP, VERBS
from tether.scoring import SCORING_VERSION
from tether.store import LogProbStore

Recipes = Callable[..., str]


@pytest.fixture
def filled(recipe: Recipes, tether: Run, tmp_path: Path) -> tuple[str, str]:  # noqa: F811
    """A recipe, and the store that its pairs were scored into."""
    path, store = recipe(eval_fraction=None), str(tmp_path / "store.sqlite")
    code, _, err = tether("precompute", path, "--ref_store", store)
    assert code == 0, err
    return path, store


def digest_in(store: str) -> str:
    (digest,) = LogProbStore(store).digests()
    return digest


@pytest.mark.parametrize("words", [["store"], ["store", "--help"]])
def test_store_names_its_verbs(tether: Run, words: list[str]) -> None:  # noqa: F811
    assert tether(*words) == (0, HELP, "")
    assert all(f"tether store {verb}" in HELP for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_of_store_explains_itself(tether: Run, verb: str) -> None:  # noqa: F811
    code, out, err = tether("store", verb, "--help")
    assert (code, err) == (0, "") and f"tether store {verb}" in out
    assert max(map(len, out.splitlines())) <= 110


def test_info_tells_which_references_a_store_holds(tether: Run, filled: tuple[str, str]) -> None:  # noqa: F811
    _, path = filled
    code, out, _ = tether("store", "info", "--store", path)
    with LogProbStore(path) as store:
        (identity,) = store.identities()
    assert code == 0 and f"store      {path} (" in out
    about = f"first scored as explicit, compute dtype float32, scoring version {SCORING_VERSION}"
    assert f"reference  {identity.digest}: {about}\n" in out
    assert f"{identity.num_records} responses, {identity.num_tokens:,} tokens" in out
    assert re.search(r"filled   \d{4}-.* UTC: model \S+; run tether precompute; max_length .*; data \S+; rows 16", out)
    assert tether("store", "info", path)[1] == out


@pytest.mark.numerics
def test_verify_scores_a_sample_again_and_says_the_largest_difference(
    tether: Run,  # noqa: F811
    filled: tuple[str, str],
) -> None:
    recipe_path, store = filled
    code, out, err = tether("store", "verify", recipe_path, "--store", store, "--sample", "10")
    assert code == 0, err
    count = LogProbStore(store).count()
    assert f"records    {count}, all that were put, every checksum correct" in out and digest_in(store) in out
    largest = float(re.search(r"difference (\S+) nats at most", out).group(1))  # type: ignore[union-attr]
    assert largest < 1e-4 and LogProbStore(store).count() == count


def test_verify_finds_a_wrong_number_and_names_its_row(tether: Run, filled: tuple[str, str]) -> None:  # noqa: F811
    recipe_path, path = filled
    digest = digest_in(path)
    with LogProbStore(path) as store:
        records = [record for batch in store.batches(digest) for record in batch]
        key, _ = max(records, key=lambda record: len(record[1]))
        store.remove(digest)
        spoiled = [(k, np.where(np.arange(len(v)) == 1, v - 0.25, v) if k == key else v) for k, v in records]
        store.put(digest, [k for k, _ in spoiled], [v for _, v in spoiled])
    code, out, err = tether("store", "verify", recipe_path, "--store", path, "--sample", "100")
    assert code == 2 and "difference 0.25 nats at most" in out
    assert re.search(r"(chosen|rejected) response of row \d+ of the train set", err) and "store prune" in err


def test_verify_finds_what_is_gone(tether: Run, filled: tuple[str, str]) -> None:  # noqa: F811
    recipe_path, path = filled
    with closing(sqlite3.connect(path)) as db, db:
        num_lost = db.execute("DELETE FROM records WHERE id % 3 = 0").rowcount
    code, out, err = tether("store", "verify", recipe_path, "--store", path)
    assert code == 2 and f"{num_lost} lost" in out and f"Cannot find {num_lost} of the" in err
    assert tether(*err.split("`tether ")[-1].split("`")[0].split())[0] == 0, "the command that it names"
    assert tether("store", "verify", recipe_path, "--store", path)[0] == 0
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET rootpage = 2 WHERE name = 'records_by_key'")
    code, out, err = tether("store", "verify", recipe_path, "--store", path)
    assert code == 2 and "tether store salvage" in err


def test_salvage_saves_what_is_intact(tether: Run, filled: tuple[str, str], tmp_path: Path) -> None:  # noqa: F811
    _, path = filled
    damaged, fresh = tmp_path / "damaged.sqlite", str(tmp_path / "fresh.sqlite")
    LogProbStore(path).copy_to(damaged)
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    code, _, err = tether("store", "info", str(damaged))
    assert code == 2 and f"`tether store salvage {damaged} --store NEW.sqlite`" in err
    code, out, err = tether("store", "salvage", str(damaged), "--store", fresh)
    assert code == 0 and f"{LogProbStore(fresh).count()} intact responses" in out, err
    code, _, err = tether("store", "salvage", fresh, "--store", fresh)
    assert code == 2 and "into itself" in err


def test_verify_of_a_store_without_the_recipes_rows_is_refused(
    tether: Run,  # noqa: F811
    recipe: Recipes,  # noqa: F811
    tmp_path: Path,
) -> None:
    code, _, err = tether("store", "verify", recipe(), "--store", str(tmp_path / "empty.sqlite"))
    assert code == 2 and "it holds none of the" in err and "tether precompute" in err


def test_records_go_out_and_come_in_as_parquet(tether: Run, filled: tuple[str, str], tmp_path: Path) -> None:  # noqa: F811
    _, store = filled
    file, other = str(tmp_path / "scores.parquet"), str(tmp_path / "other.sqlite")
    code, out, _ = tether("store", "export", file, "--store", store, "--identity", digest_in(store)[:6])
    count = LogProbStore(store).count()
    assert code == 0 and f"{count} responses of {digest_in(store)}" in out
    code, out, _ = tether("store", "import", file, "--store", other)
    assert code == 0 and out.startswith(f"{count} responses were new")
    assert tether("store", "import", file, "--store", other)[1].startswith("0 responses were new")


def test_rows_go_out_with_their_sums_and_train_without_a_pass(
    tether: Run,  # noqa: F811
    filled: tuple[str, str],
    recipe: Recipes,  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe_path, store = filled
    file = str(tmp_path / "rows.parquet")
    code, out, err = tether("store", "export", file, "--rows", recipe_path, "--store", store)
    assert code == 0 and "16 pairs with ref_chosen_logps" in out, err
    columns = datasets.Dataset.from_parquet(file).column_names
    assert {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"} <= set(columns)
    code, out, err = tether("train", recipe(train_data=file, eval_fraction=None))
    assert code == 0, err
    assert "reference  given" in out and " 0 passes" in out
    code, _, err = tether("store", "import", file, "--store", store)
    assert code == 2 and "Name it as the training data" in err


def test_shards_of_several_machines_merge_into_the_whole(
    tether: Run,  # noqa: F811
    filled: tuple[str, str],
    tmp_path: Path,
) -> None:
    recipe_path, whole = filled
    parts = [str(tmp_path / f"part-{number}.sqlite") for number in (1, 2, 3)]
    for number, part in enumerate(parts, 1):
        code, out, err = tether("precompute", recipe_path, "--shard", f"{number}/3", "--ref_store", part)
        assert code == 0 and f"part {number} of 3" in out, err
    joined = str(tmp_path / "joined.sqlite")
    code, out, _ = tether("store", "merge", *parts, "--store", joined)
    count = LogProbStore(whole).count()
    assert code == 0 and out.count("were new in") == 3 and f"now has {count}." in out
    words = ["--ref_store", joined, "--precompute_ref_log_probs", "--ref_store_mode", "require"]
    code, out, err = tether("train", recipe_path, *words)
    assert code == 0 and " 0 passes" in out, err


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b"])
def test_a_shard_that_is_none_is_refused(tether: Run, shard: str) -> None:  # noqa: F811
    code, _, err = tether("precompute", "recipe.yaml", "--shard", shard)
    assert code == 2 and "--shard 1/4" in err


def test_require_says_the_command_that_fills_the_store(
    tether: Run,  # noqa: F811
    recipe: Recipes,  # noqa: F811
    tmp_path: Path,
) -> None:
    words = [recipe(), "--precompute_ref_log_probs", "--ref_store_mode", "require"]
    code, _, err = tether("train", *words)
    assert code == 2 and re.search(r"response of row \d+ of the train set \(prompt: '\S", err), err
    command = err.split("`tether ")[-1].split("`")[0].split()
    assert tether(*command)[0] == 0
    assert tether("train", *words)[0] == 0


def test_prune_removes_what_it_is_told_to(tether: Run, filled: tuple[str, str]) -> None:  # noqa: F811
    _, store = filled
    count = LogProbStore(store).count()
    assert tether("store", "prune", "--store", store, "--older_than", "30")[1].startswith("0 responses")
    code, out, _ = tether("store", "prune", "--store", store, "--identity", digest_in(store)[:8])
    assert code == 0 and out.startswith(f"{count} responses were removed") and "now has 0." in out
    code, out, _ = tether("store", "info", "--store", store)
    assert code == 0 and "It is empty." in out


REFUSALS: dict[str, tuple[list[str], str]] = {
    "no such verb": (["inof"], "Did you mean 'info'?"),
    "no store": (["info", "--store", "nowhere.sqlite"], "tether precompute"),
    "a folder": (["info", "--store", "."], "Name a file"),
    "a merge of no store": (["merge", "nowhere.sqlite", "--store", "STORE"], "A store is created where"),
    "a merge of a folder": (["merge", ".", "--store", "STORE"], "Name a file"),
    "an unknown option": (["merge", "a.sqlite", "--into", "b"], "--help"),
    "prune of everything": (["prune", "--store", "STORE"], "Name an `identity`"),
    "no such reference": (["prune", "--store", "STORE", "--identity", "zz"], "tether store info"),
    "two references": (["export", "x.parquet", "--store", "STORE"], "--identity"),
    "prune by no age": (["prune", "--store", "STORE", "--older_than", "0"], "--older_than 90"),
    "prune by a negative age": (["prune", "--store", "STORE", "--older_than", "-1"], "--older_than 90"),
    "prune by an age that is no number": (["prune", "--store", "STORE", "--older_than", "nan"], "--older_than 90"),
    "prune by nothing": (["prune", "--store", "STORE", "--identity", ""], "tether store info"),
    "export onto the store": (["export", "STORE", "--store", "STORE", "--identity", "aaaa"], "Name a new file"),
    "export of rows onto the store": (
        ["export", "STORE", "--store", "STORE", "--rows", "RECIPE"],
        "Name a new file",
    ),
    "export under a name of another kind": (
        ["export", "scores.jsonl", "--store", "STORE", "--identity", "aaaa"],
        "ends in .parquet",
    ),
    "export of rows under a name of another kind": (
        ["export", "rows.jsonl", "--store", "STORE", "--rows", "RECIPE"],
        "ends in .parquet",
    ),
    "rows of another reference": (
        ["export", "x.parquet", "--rows", "r.yaml", "--identity", "a"],
        "Leave `--identity` out",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_store_refuses_with_what_to_write(
    tether: Run,  # noqa: F811
    recipe: Recipes,  # noqa: F811
    name: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "store.sqlite"
    with LogProbStore(path) as store:
        for digest in ("aaaa", "bbbb"):
            store.put(digest, [b"0" * 16], [np.zeros(2, np.float32)])
    words, said = REFUSALS[name]
    given = {"STORE": str(path), "RECIPE": recipe()}
    code, out, err = tether("store", *[given.get(word, word) for word in words])
    assert (code, out) == (2, "")
    with LogProbStore(path) as store:
        assert store.count() == 2
    assert said in err.rstrip().splitlines()[-1]


def test_precompute_that_is_stopped_says_what_is_kept(
    tether: Run,  # noqa: F811
    recipe: Recipes,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tether.reference import ExplicitReference

    score, path = ExplicitReference.log_probs, recipe(eval_fraction=None, precompute_ref_batch_size=1)

    def interrupted(self: Any, batch: Any) -> Any:
        if self.num_passes == 3:
            raise KeyboardInterrupt
        return score(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(ExplicitReference, "log_probs", interrupted)
        code, _, err = tether("precompute", path)
    assert code == 130
    kept = int(re.search(r"stopped\. (\d+) of 16 rows of the train set are kept", err).group(1))  # type: ignore[union-attr]
    assert 0 < kept < 16 and "run the same command to continue" in err
    code, out, _ = tether("precompute", path)
    found = int(re.search(r"(\d+) responses found", out).group(1))  # type: ignore[union-attr]
    assert code == 0 and found >= kept


def test_info_of_a_copy_in_a_folder_reads_only(tether: Run, filled: tuple[str, str], tmp_path: Path) -> None:  # noqa: F811
    _, path = filled
    copy = tmp_path / "copy" / "store.sqlite"
    copy.parent.mkdir()
    LogProbStore(path).copy_to(copy)
    before = copy.read_bytes()
    assert tether("store", "info", "--store", str(copy))[0] == 0
    assert copy.read_bytes() == before


def test_a_store_without_a_name_is_refused(tether: Run) -> None:  # noqa: F811
    code, _, err = tether("store", "info", "--store", "")
    assert code == 2 and "Cannot open a log-prob store at an empty path" in err
