"""What tests of several presses share."""

from __future__ import annotations

import pytest

from kvzip_press.decoding import step as decoding


@pytest.fixture
def static_steps(monkeypatch):
    """Decode steps over static layers on a CPU: what a GPU captures, run anew each time."""

    def trial(self, compiled: bool = False) -> None:
        start = self.positions.clone()
        self.run()
        self._rewind(start)

    monkeypatch.setattr(decoding, "_reason_against", lambda model, cache, device: decoding.reason_against(cache))
    monkeypatch.setattr(decoding._StaticStep, "capture", trial)
