"""A library newer than what the tests ran with is one line at the start of a run."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import tether.trainer.versions
from support.runs import make_trainer
from support.tiny import tiny_model


@pytest.fixture(autouse=True)
def fresh() -> None:
    tether.trainer.versions.note_untested.cache_clear()


def test_a_newer_library_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tether.trainer.versions, "TESTED_UP_TO", {"torch": "1.13", "peft": "999.0"})
    with caplog.at_level(logging.WARNING, logger="tether"):
        for name in ("1", "2"):
            make_trainer(tmp_path / name, tiny_model())
    said = [record.getMessage() for record in caplog.records if "Newer than" in record.getMessage()]
    assert len(said) == 1 and "torch" in said[0] and "peft" not in said[0]


def test_versions_that_were_tested_are_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, tiny_model())
    assert "Newer than" not in caplog.text
