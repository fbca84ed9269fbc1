"""What a run may do in its output folder, and what it may remove there."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils import checkpoint as commits
from utils import output_folder
from utils.errors import UsageError
from utils.output_folder import Claim, begin, claim, claim_for_all, finish, remove_own_files, run_id

SCRIPT = "run_clm.py"
ARGUMENTS = {"max_steps": 4, "train_file": ["a.txt"], "seed": 1, "logging_steps": 5, "output_dir": "out"}


def checkpoint(folder: Path, step: int, processes: int = 1) -> Path:
    """A checkpoint that the folder's run has committed."""
    staged = commits.staged_folder(folder, step)
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_text("weights")
    (staged / "trainer_state.json").write_text('{"global_step": 1}')
    return commits.commit(staged, run_id(folder), step, processes)


def bare_checkpoint(folder: Path, step: int, state: str | None = '{"global_step": 1}') -> Path:
    """A checkpoint as transformers writes it; with no state it is half-written."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_text("weights")
    if state is not None:
        (made / "trainer_state.json").write_text(state)
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of a run that has begun."""
    begin(str(tmp_path / "out"), SCRIPT, ARGUMENTS, overwrite=False)
    return tmp_path / "out"


def ask(
    folder: Path,
    script: str = SCRIPT,
    overwrite: bool = False,
    resume: Path | str | None = None,
    processes: int = 1,
    **changes,
) -> Claim:
    return claim(str(folder), script, ARGUMENTS | changes, overwrite, resume and str(resume), processes)


def refusal(*arguments, **changes) -> str:
    with pytest.raises(UsageError) as caught:
        ask(*arguments, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- a claim ----
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_or_empty_folder_is_free(overwrite, tmp_path):
    assert ask(tmp_path / "a" / "b", overwrite=overwrite) == Claim("start")
    assert not (tmp_path / "a").exists()
    assert ask(tmp_path, overwrite=overwrite) == Claim("start")


@pytest.mark.parametrize("name", ["notes.txt", "text.json", "model.txt", "results"])
def test_files_that_no_run_would_write_over_do_not_matter(name, tmp_path):
    (tmp_path / name).write_text("x")
    assert ask(tmp_path) == Claim("start")


@pytest.mark.parametrize("source", ["tokenizer_name", "config_name"])
def test_what_the_run_starts_from_may_lie_there(source, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("x")
    assert ask(tmp_path, **{source: str(tmp_path)}) == Claim("start")
    (tmp_path / "pytorch_model.bin").write_text("x")
    assert "holds pytorch_model.bin" in refusal(tmp_path, **{source: str(tmp_path)})


@pytest.mark.parametrize("within", ["", "checkpoint-2"])
@pytest.mark.parametrize("flag", ["model_name_or_path", "tokenizer_name", "config_name"])
def test_what_the_run_starts_from_is_not_removed(flag, within, folder):
    checkpoint(folder, 2)
    finish(str(folder))
    named = {flag: str(folder / within)}
    message = refusal(folder, overwrite=True, **named)
    assert message.startswith(f"--overwrite_output_dir: would remove --{flag} {folder / within}".rstrip("/"))
    assert "name another --output_dir" in message
    begin(str(folder), SCRIPT, ARGUMENTS | {flag: None}, overwrite=False)
    told = refusal(folder, **named)
    assert f"holds a run with --{flag} None" in told and "overwrite" not in told
    assert ask(folder, overwrite=True, **{flag: str(folder.parent)}) == Claim("start")


@pytest.mark.parametrize(
    "name",
    [
        "trainer_state.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "checkpoint-5",
        "config.json",
        "tokenizer.json",
        "README.md",
        "results.md",
    ],
)
def test_what_another_program_or_person_made_is_not_written_over(name, tmp_path):
    (tmp_path / name).mkdir() if name == "checkpoint-5" else (tmp_path / name).write_text("x")
    message = refusal(tmp_path)
    assert f"--output_dir {tmp_path}: " in message and name in message and "--overwrite_output_dir" in message
    assert ask(tmp_path, overwrite=True) == Claim("start")


def test_an_unfinished_run_without_a_checkpoint_starts_again(folder):
    found = ask(folder)
    assert (found.verdict, found.checkpoint) == ("start", None) and "no whole checkpoint" in found.note


def test_an_unfinished_run_goes_on_from_its_newest_whole_checkpoint(folder):
    for step in (2, 9, 10):
        checkpoint(folder, step)
    damaged = checkpoint(folder, 11)
    (damaged / "model.safetensors").write_text("WEIGHTS")
    bare_checkpoint(folder, 13)
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-12").write_text("a file")
    for resume in (None, "auto"):
        found = ask(folder, resume=resume)
        assert (found.verdict, found.checkpoint) == ("resume", str(folder / "checkpoint-10"))
        assert "checkpoint-10" in found.note


def test_the_newest_is_the_one_committed_last_not_the_one_with_most_steps(folder):
    for step in (10, 20, 15):
        checkpoint(folder, step)
    assert ask(folder).checkpoint == str(folder / "checkpoint-15")


@pytest.mark.parametrize("half", [None, "", '{"global_step": 2'])
def test_half_a_checkpoint_is_none(half, folder, caplog):
    bare_checkpoint(folder, 4, state=half)
    assert ask(folder).verdict == "start"
    assert "checkpoint-4: manifest.json is missing" in caplog.text


def test_what_a_killed_save_left_goes_at_the_next_start(folder):
    own = checkpoint(folder, 2)
    (folder / "_incomplete" / "checkpoint-4").mkdir(parents=True)
    (folder / "_incomplete" / "checkpoint-4" / "model.safetensors").write_text("wei")
    assert ask(folder).checkpoint == str(own)
    begin(str(folder), SCRIPT, ARGUMENTS, overwrite=False)
    assert not (folder / "_incomplete").exists() and own.exists()


def test_a_finished_run_leaves_no_empty_folder(folder):
    checkpoint(folder, 2)
    (folder / "_incomplete").mkdir(exist_ok=True)
    finish(str(folder))
    assert not (folder / "_incomplete").exists()
    (folder / "_incomplete" / "somebody's").mkdir(parents=True)
    finish(str(folder))
    assert (folder / "_incomplete" / "somebody's").exists()


@pytest.mark.parametrize("resume", [None, "auto", "named"])
def test_another_number_of_processes_is_refused(resume, folder):
    own = checkpoint(folder, 2, processes=2)
    message = refusal(folder, resume=own if resume == "named" else resume)
    assert "was written by 2 processes, this run has 1" in message and "--nproc_per_node" in message
    assert message.endswith("or add --elastic")
    assert ask(folder, processes=None).checkpoint == str(own)
    assert ask(folder, processes=2).checkpoint == str(own)


def test_an_output_folder_is_no_checkpoint(folder):
    checkpoint(folder, 2)
    (folder / "trainer_state.json").write_text("{}")
    assert "name a folder checkpoint-N in it" in refusal(folder, resume=folder)


@pytest.mark.parametrize("now, is_told", [(10, False), (9, True), (None, False)])
def test_other_text_than_the_run_began_with_is_told(now, is_told, folder, caplog):
    begin(str(folder), SCRIPT, ARGUMENTS, overwrite=False, tokens=10)
    begin(str(folder), SCRIPT, ARGUMENTS, overwrite=False, tokens=now)
    assert ("has 9 tokens, and had 10 when this run began" in caplog.text) == is_told
    begin(str(folder), SCRIPT, ARGUMENTS, overwrite=True, tokens=8)
    assert "8 tokens" not in caplog.text


def test_auto_with_nothing_to_resume_from_says_so(folder, tmp_path):
    for empty in (folder, tmp_path / "new"):
        found = ask(empty, resume="auto")
        assert found.verdict == "start" and "starting anew" in found.note
    assert "leave one of the two flags out" in refusal(folder, resume="auto", overwrite=True)


def test_a_finished_run_has_nothing_to_do(folder):
    checkpoint(folder, 4)
    finish(str(folder))
    found = ask(folder)
    assert found.verdict == "finished" and "--overwrite_output_dir" in found.note
    assert ask(folder, overwrite=True) == Claim("start")


@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused_by_its_first_difference(finished, folder):
    if finished:
        finish(str(folder))
    message = refusal(folder, train_file=["b.txt"], seed=2)
    assert f"--output_dir {folder}: holds a run with --train_file ['a.txt'], this one has ['b.txt']" in message
    assert "--overwrite_output_dir" in message
    assert ask(folder, seed=2, overwrite=True) == Claim("start")


@pytest.mark.parametrize(
    "name",
    ["logging_steps", "log_level", "report_to", "run_name", "disable_tqdm", "output_dir", "hub_model_id"]
    + ["resume_from_checkpoint", "overwrite_output_dir", "push_to_hub", "logging_first_step", "log_level_replica"],
)
def test_flags_about_reporting_make_no_other_run(name, tmp_path):
    begin(str(tmp_path), SCRIPT, ARGUMENTS | {name: "before"}, False)
    assert ask(tmp_path, **{name: "now"}).verdict == "start"


def test_a_flag_that_only_one_release_knows_makes_no_other_run(folder):
    assert ask(folder, new_flag=5).verdict == "start"


def test_another_scripts_run_is_refused(folder):
    message = refusal(folder, "run_mlm.py")
    assert "is the output of run_clm.py, not of run_mlm.py" in message and "--overwrite_output_dir" in message


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        '{"script": "run_clm.py"}',
        b"\xff\xfe",
        '{"script": 1, "arguments": 5, "finished": 0}',
    ]
    + ['{"script": "run_clm.py", "arguments": null, "finished": false}', '{"script": "run_clm.py", "arguments": {}}'],
)
def test_an_unreadable_record(content, folder):
    (folder / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(folder)
    assert str(folder / "run.json") in message and "name another --output_dir" in message
    assert ask(folder, overwrite=True) == Claim("start")
    begin(str(folder), SCRIPT, ARGUMENTS, overwrite=True)
    assert ask(folder).verdict == "start"


# ---- --resume_from_checkpoint ----
@pytest.mark.parametrize("changes", [{}, {"seed": 2}])
def test_an_explicit_checkpoint_is_taken_whatever_the_folder_holds(changes, folder, tmp_path):
    chosen, elsewhere = checkpoint(folder, 2), checkpoint(tmp_path / "elsewhere", 7)
    checkpoint(folder, 4)
    for resume in (chosen, elsewhere):
        assert ask(folder, resume=resume, **changes) == Claim("resume", str(resume))
        assert ask(tmp_path / "new", resume=resume, **changes) == Claim("resume", str(resume))
    finish(str(folder))
    assert ask(folder, resume=chosen) == Claim("resume", str(chosen))
    assert ask(folder, resume=elsewhere, overwrite=True) == Claim("resume", str(elsewhere))


def test_an_explicit_checkpoint_that_is_none(folder, tmp_path):
    for resume in (tmp_path / "no", bare_checkpoint(folder, 3, state=None), folder / "run.json", Path("True")):
        assert refusal(folder, resume=resume).startswith(f"--resume_from_checkpoint {resume}: is no checkpoint")


def test_an_explicit_checkpoint_that_is_damaged_is_refused(folder):
    checkpoint(folder, 2)
    damaged = checkpoint(folder, 4)
    (damaged / "model.safetensors").write_text("weight")
    message = refusal(folder, resume=damaged)
    assert message.startswith(f"--resume_from_checkpoint {damaged}: model.safetensors has 6 bytes, 7 were written")
    (damaged / "model.safetensors").unlink()
    assert "model.safetensors cannot be read" in refusal(folder, resume=damaged)


def test_an_explicit_checkpoint_without_a_manifest_is_taken(folder):
    bare = bare_checkpoint(folder, 7)
    assert ask(folder, resume=bare) == Claim("resume", str(bare))


def test_an_explicit_checkpoint_that_would_be_removed(folder):
    assert "--overwrite_output_dir removes it" in refusal(folder, resume=checkpoint(folder, 2), overwrite=True)


# ---- a folder that cannot be one ----
def test_a_folder_under_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        assert f"--output_dir {folder}: {tmp_path / 'file'} is a file" in refusal(folder)


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    assert f"{tmp_path} may not be written to" in refusal(tmp_path / "a" / "b")


# ---- several processes ----
def test_only_the_main_process_looks(folder, caplog):
    finish(str(folder))
    args = SimpleNamespace(
        process_index=0, world_size=1, output_dir=str(folder), overwrite_output_dir=False, dry_run=False, elastic=False
    )
    args.resume_from_checkpoint, args.fsdp, args.deepspeed = None, False, None
    assert claim_for_all(args, SCRIPT, ARGUMENTS).verdict == "finished"
    assert "finished already" in caplog.text
    with pytest.raises(UsageError, match="--seed 1, this one has 2"):
        claim_for_all(args, SCRIPT, ARGUMENTS | {"seed": 2})
    args.resume_from_checkpoint, args.fsdp = str(checkpoint(folder, 2)), True
    with pytest.raises(UsageError, match="was written without --fsdp and --deepspeed, and this run is with --fsdp"):
        claim_for_all(args, SCRIPT, ARGUMENTS)


# ---- removal ----
OWN = [
    *("run.json", "results.md", "all_results.json", "train_results.json", "eval_results.json", "trainer_state.json"),
    *("training_args.bin", "README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "runs/Nov24_03-00-00_host/events.out.tfevents.17.host.1.0"),
    *(f"checkpoint-20/{name}" for name in ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt")),
    *(f"checkpoint-20/{name}" for name in ("scaler.pt", "rng_state.pth", "rng_state_1.pth", "trainer_state.json")),
]
FOREIGN = [
    *("notes.txt", "my_model.safetensors", "config.json.bak", "run.json.old", "data/config.json", "data/run.json"),
    *("checkpoint-20/notes.txt", "checkpoint-20/README.md", "checkpoint-20/analysis/config.json"),
    *("checkpoint-best/config.json", "runs/README.md", "runs/config.json", "runs/Nov24_03-00-00_host/notes.txt"),
    *("eval_12-30-00_mine/README.md", "my-checkpoint-3/model.safetensors", "events.out.tfevents.17"),
]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_only_own_files_are_removed(tmp_path):
    fill(tmp_path, OWN + FOREIGN)
    remove_own_files(tmp_path)
    assert files(tmp_path) == set(FOREIGN)


def test_nothing_is_left_where_all_is_own(tmp_path):
    fill(tmp_path, OWN)
    remove_own_files(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_link_is_followed(tmp_path):
    (tmp_path / "safe").mkdir()
    fill(tmp_path / "safe", OWN)
    folder = tmp_path / "out"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-1").symlink_to(tmp_path / "safe" / "checkpoint-20")
    (folder / "runs").symlink_to(tmp_path / "safe" / "runs")
    (folder / "config.json").symlink_to(tmp_path / "safe" / "config.json")
    (folder / "checkpoint-2" / "model.safetensors").symlink_to(tmp_path / "safe" / "model.safetensors")
    remove_own_files(folder)
    assert files(tmp_path / "safe") == set(OWN)
    assert sorted(entry.name for entry in folder.iterdir()) == ["checkpoint-1", "runs"]


def test_overwriting_clears_own_files_and_records_the_new_run(folder):
    fill(folder, OWN[1:] + FOREIGN)
    begin(str(folder), "run_mlm.py", {"seed": 3}, overwrite=True)
    assert files(folder) == {*FOREIGN, "run.json"}
    record = json.loads((folder / "run.json").read_text())
    assert (record["script"], record["arguments"], record["finished"]) == ("run_mlm.py", {"seed": 3}, False)


def test_a_run_that_goes_on_removes_nothing(folder):
    fill(folder, OWN[1:] + FOREIGN)
    begin(str(folder), SCRIPT, ARGUMENTS, overwrite=False)
    assert files(folder) == {*OWN, *FOREIGN}


def test_another_programs_checkpoints_are_neither_resumed_nor_removed(tmp_path):
    fill(tmp_path, FOREIGN)
    bare_checkpoint(tmp_path, 500)
    for _ in range(2):
        begin(str(tmp_path), SCRIPT, ARGUMENTS, overwrite=True)
        assert (tmp_path / "checkpoint-500" / "model.safetensors").exists()
    assert ask(tmp_path).verdict == "start"
    begin(str(tmp_path), SCRIPT, ARGUMENTS, overwrite=False)
    own = checkpoint(tmp_path, 10)
    assert ask(tmp_path).checkpoint == str(own)
    finish(str(tmp_path))
    begin(str(tmp_path), SCRIPT, ARGUMENTS, overwrite=True)
    assert not own.exists() and (tmp_path / "checkpoint-500").exists()


def test_a_record_is_never_half_written(folder, monkeypatch):
    before = (folder / "run.json").read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(output_folder.os, "replace", fail)
    with pytest.raises(OSError):
        finish(str(folder))
    assert (folder / "run.json").read_text() == before
