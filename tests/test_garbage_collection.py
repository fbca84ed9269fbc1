"""utils/garbage_collection.py: paused within, and afterwards as before."""

import gc

import pytest

from utils import garbage_collection


def test_it_is_paused_within_and_goes_on_after_an_error() -> None:
    with pytest.raises(KeyError), garbage_collection.paused():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_who_has_turned_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with garbage_collection.paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
