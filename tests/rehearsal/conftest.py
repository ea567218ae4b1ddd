"""One house for all rehearsals of a process; its table is printed at the end (tests/conftest.py)."""

from __future__ import annotations

import pytest

from tests.conftest import print_at_the_end


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory, request):
    from tests.rehearsal.house import House
    from tests.rehearsal.steps import Rehearsal

    house = House(tmp_path_factory.mktemp("rehearsal") / "tessera")
    made = Rehearsal(house)
    yield made
    house.close()
    print_at_the_end(request.config, "rehearsals", made.table())
