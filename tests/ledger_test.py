"""The clock of a run; what else the ledger does is seen in train_test, where runs are stopped and go on."""

import pytest

from worldlm_jax import ledger


def test_all_time_belongs_to_one_activity(monkeypatch: pytest.MonkeyPatch) -> None:
  now = [10.0]
  monkeypatch.setattr(ledger.time, "perf_counter", lambda: now[0])
  seconds = {"training": 100.0}
  clock = ledger.Clock(seconds)
  now[0] = 13.0
  clock.restart()  # what was before is nobody's
  now[0] = 18.0
  clock.apart("compiling", 2.0)
  clock.apart("waiting_for_data", 0.5)
  now[0] = 20.0
  clock.lap("training")
  now[0] = 21.5
  clock.lap("saving")
  clock.apart("compiling", 4.0)  # while the devices finished something else
  now[0] = 26.0
  clock.lap("evaluating", 24.0)  # it had come then
  clock.lap("aggregating", 25.75)
  assert seconds == {"training": 104.5, "compiling": 6.0, "waiting_for_data": 0.5, "saving": 1.5, "evaluating": 0.0,
                     "aggregating": 0.25}
