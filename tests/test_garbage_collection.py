"""utils/garbage_collection.py: paused within, and afterwards as before."""

import gc

import commands
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


def test_what_a_script_imports_is_never_looked_through_again() -> None:
    frozen, before = gc.get_freeze_count(), len(gc.get_objects())
    with garbage_collection.last_imports():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() >= frozen + before
    kept = [object()]
    assert any(found is kept for found in gc.get_objects())  # what comes later is


def test_an_import_that_fails_freezes_nothing() -> None:
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), garbage_collection.last_imports():
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() == frozen


@pytest.mark.parametrize("script, family", [("run_clm.py", "gpt2"), ("run_mlm.py", "bert"), ("run_plm.py", "xlnet")])
def test_a_script_leaves_its_imports_alone(script, family, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("A few words.\n")
    (tmp_path / "run.py").write_text(
        "import gc, runpy, sys\n"
        f"sys.path[0] = {str(commands.ROOT)!r}\n"
        "before = gc.get_freeze_count()\n"
        f"try: runpy.run_path({script!r}, run_name='__main__')\n"
        "finally: print(gc.get_freeze_count() - before)\n"
    )
    flags = [f"--{kind}={tmp_path}/{name}" for kind, name in (("train_file", "text.txt"), ("output_dir", "run"))]
    flags += ["--do_train", "--use_cpu", f"--model_type={family}", "--tokenizer_name=/nowhere"]
    done = commands.run_warm([str(tmp_path / "run.py"), *flags])
    assert "/nowhere" in done.stderr and int(done.stdout.split()[-1]) > 1000, done
