"""What commands share."""

import gc

import pytest

from lisatune.cli.common import heavy_imports


@pytest.mark.quick
def test_the_search_for_garbage_is_off_while_libraries_are_imported_and_on_again_after_a_failure():
    found = []

    def fail() -> None:
        with heavy_imports():
            found.append(gc.isenabled())
            raise ImportError("a library is missing")

    with pytest.raises(ImportError, match="a library"):
        fail()
    assert found == [False]
    assert gc.isenabled()
    gc.unfreeze()
