"""Raw rows on disk: whole lines, the same conditions, one writer."""

from __future__ import annotations

import json

import pytest

from moesim.calibrate.store import NAME, Store, read_lines
from moesim.errors import CalibrationError

HERE = {"schema": 1, "gpu": None, "torch": "2.13.0", "cpu": "a cpu", "cores": 2, "date": "today", "memory": "23 GiB"}
ROW = {"family": "gemm", "m": 1, "n": 2, "k": 3, "dtype": "fp32", "seconds": 1e-3, "mad_s": 0.0, "samples": [1e-3]}


def filled(directory):
    store = Store(directory, HERE)
    store.add(ROW)
    store.close({"cost_s": 1.0})


def test_rows_come_back(tmp_path):
    filled(tmp_path)
    again = Store(tmp_path, HERE | {"date": "tomorrow", "memory": "24 GiB"})
    assert again.rows == [ROW]
    again.close({"cost_s": 2.0})
    assert [next(iter(line)) for line in read_lines(tmp_path / NAME)] == ["conditions", "row", "session", "session"]


def test_a_torn_last_line_is_cut_off(tmp_path):
    filled(tmp_path)
    with (tmp_path / NAME).open("a") as file:
        file.write('{"row": {"family": "ge')
    store = Store(tmp_path, HERE)
    store.add(ROW | {"m": 2})
    store.close({"cost_s": 1.0})
    assert [line["row"]["m"] for line in read_lines(tmp_path / NAME) if "row" in line] == [1, 2]


def test_other_conditions_are_refused(tmp_path):
    filled(tmp_path)
    with pytest.raises(CalibrationError, match=r"gpu None, here it is NVIDIA H200 .*torch.*choose another -o") as e:
        Store(tmp_path, HERE | {"torch": "2.14.0", "gpu": "NVIDIA H200"})
    assert "\n" not in str(e.value)
    assert len(read_lines(tmp_path / NAME)) == 3  # nothing was written


def test_two_writers_are_refused(tmp_path):
    first = Store(tmp_path, HERE)
    with pytest.raises(CalibrationError, match="another calibrate"):
        Store(tmp_path, HERE)
    first.close({"cost_s": 0.0})


def test_a_profile_without_its_rows_is_not_overwritten(tmp_path):
    (tmp_path / "meta.yaml").write_text("name: shipped\n")
    with pytest.raises(CalibrationError, match="choose -o"):
        Store(tmp_path, HERE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"row": ROW}) + "\n", "without their conditions"),
        ("not json\n", "line 1: not a line"),
        (json.dumps({"conditions": HERE}) + "\n[1]\n", "line 2: not a line"),
        (json.dumps({"conditions": HERE}) + '\n{"rows": {}}\n', "line 2: unknown entry rows"),
        (b"\xff\xfe\n", "not text"),
    ],
)
def test_what_is_not_calibrates_is_refused(tmp_path, text, message):
    (tmp_path / NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CalibrationError, match=message):
        Store(tmp_path, HERE)
