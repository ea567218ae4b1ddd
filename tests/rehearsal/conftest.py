"""One house for all rehearsals of a session; its table is printed at the end."""

from __future__ import annotations

import pytest

_TABLE = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory, request):
    from tests.rehearsal.house import House
    from tests.rehearsal.steps import Rehearsal

    house = House(tmp_path_factory.mktemp("rehearsal") / "tessera")
    made = Rehearsal(house)
    yield made
    house.close()
    request.config.stash[_TABLE] = made.table()


def pytest_terminal_summary(terminalreporter, config):
    if table := config.stash.get(_TABLE, None):
        terminalreporter.section("rehearsals")
        terminalreporter.write_line(table)
