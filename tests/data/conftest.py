"""The tests say themselves where converted files go."""

import pytest


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.delenv("ENCDIFF_CACHE", raising=False)
