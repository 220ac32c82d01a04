"""benchmarks/training_speed.py on a small network."""

import json
from pathlib import Path

import pytest

from benchmarks import training_speed


@pytest.mark.slow
def test_ways_take_turns_and_are_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--ways", "plain", "structure", "--compile", "off", "--model", "small", "--micro-batch", "2"]
    arguments += ["--rounds", "2", "--steps", "1", "--threads", "1", "--json", str(file)]
    assert training_speed.main(arguments) == 0
    written = json.loads(file.read_text())
    assert [row["way"] for row in written["rows"]] == list(written["seconds"]) == ["plain, off", "structure, off"]
    plain, structure = written["rows"]
    assert plain["ratio_to_first_way"] == 1.0 and structure["ratio_to_first_way"] > 0
    for row in written["rows"]:
        assert len(written["seconds"][row["way"]]) == 2 and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["images_per_s"] == pytest.approx(2e3 / row["median_ms"])
    assert "structure, off" in capsys.readouterr().out
