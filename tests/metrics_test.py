"""Records survive cut lines and full disks, and are valid JSON."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from worldlm_jax import metrics

ROWS = [{"round": 0, "loss_nats": 2.5}, {"round": 0, "loss_nats": None}, {"round": 1, "loss_nats": 1.5}]


def _no_space(*_: Any, **__: Any) -> None:
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
  path = tmp_path / "summary.json"
  metrics.write_json(path, {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": {"d": math.nan}, "e": True})
  text = path.read_text()
  assert json.loads(text, parse_constant=pytest.fail) == {
    "a": None, "b": [None, [None, 1.5]], "c": {"d": None}, "e": True
  }
  assert text.endswith("}\n")


def test_json_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path = tmp_path / "summary.json"
  metrics.write_json(path, {"round": 1})
  seen: list[Any] = []
  replace = Path.replace
  monkeypatch.setattr(Path, "replace", lambda new, old: (seen.append(json.loads(new.read_text())), replace(new, old)))
  monkeypatch.setattr(os, "fsync", lambda _: seen.append(json.loads(path.read_text())))
  metrics.write_json(path, {"round": 2})
  assert seen == [{"round": 1}, {"round": 2}]  # the old one until the new one is complete
  assert json.loads(path.read_text()) == {"round": 2}
  assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_json_on_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path = tmp_path / "summary.json"
  metrics.write_json(path, {"round": 1})
  monkeypatch.setattr(os, "fsync", _no_space)
  with pytest.raises(OSError, match=r"no space left while writing .*summary\.json: ") as caught:
    metrics.write_json(path, {"round": 2})
  assert caught.value.errno == errno.ENOSPC
  assert json.loads(path.read_text()) == {"round": 1}


def test_jsonl_is_on_the_disk_before_anything_is_built_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path, seen = tmp_path / "metrics.jsonl", list[list[dict[str, Any]]]()
  monkeypatch.setattr(os, "fsync", lambda _: seen.append(metrics.read_jsonl(path)))
  for rows in (ROWS[:1], ROWS[1:]):
    metrics.append_jsonl(path, rows)
  assert seen == [ROWS[:1], ROWS]


def test_jsonl_on_a_full_disk_says_what_to_do() -> None:
  with pytest.raises(OSError, match=r"no space left while writing /dev/full: the newest complete checkpoint is kept; "
                                    r"free some space .*keep_last.* and run the same command again to resume"):
    metrics.append_jsonl(Path("/dev/full"), ROWS)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
  with pytest.raises(FileNotFoundError):
    metrics.append_jsonl(tmp_path / "missing" / "metrics.jsonl", ROWS)
  with pytest.raises(FileNotFoundError):
    metrics.write_json(tmp_path / "missing" / "summary.json", {})


def test_a_full_disk_is_recognised_through_what_it_caused() -> None:
  full, quota = OSError(errno.ENOSPC, "x"), OSError(errno.EDQUOT, "x")
  caused, context = RuntimeError("save failed"), RuntimeError("save failed")
  caused.__cause__, context.__context__ = full, RuntimeError("commit failed")
  context.__context__.__context__ = quota
  in_words = RuntimeError("RESOURCE_EXHAUSTED: No space left on device")
  assert all(metrics.out_of_space(error) for error in (full, quota, caused, context, in_words))
  assert not metrics.out_of_space(OSError(errno.EACCES, "x"))
  assert not metrics.out_of_space(ValueError("other"))


def test_jsonl_is_appended_to(tmp_path: Path) -> None:
  path = tmp_path / "metrics.jsonl"
  assert metrics.read_jsonl(path) == []
  metrics.append_jsonl(path, ROWS[:1])
  metrics.append_jsonl(path, iter([{"round": 0, "loss_nats": math.nan}, ROWS[2]]))
  assert metrics.read_jsonl(path) == ROWS
  assert len(path.read_text().splitlines()) == 3


def test_a_line_that_was_cut_short_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
  path = tmp_path / "metrics.jsonl"
  metrics.append_jsonl(path, ROWS)
  whole = path.read_bytes()
  starts = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    complete = sum(size >= end - 1 for end in starts[1:])  # a row needs no line end
    assert metrics.read_jsonl(path) == ROWS[:complete], size
    metrics.keep_jsonl(path, lambda row: True)
    metrics.append_jsonl(path, ROWS[complete:])
    assert metrics.read_jsonl(path) == ROWS, size


def test_keep_jsonl_drops_rows(tmp_path: Path) -> None:
  path = tmp_path / "metrics.jsonl"
  metrics.keep_jsonl(path, lambda row: False)
  assert not path.exists()
  metrics.append_jsonl(path, ROWS)
  metrics.keep_jsonl(path, lambda row: row["round"] < 1)
  assert metrics.read_jsonl(path) == ROWS[:2]
