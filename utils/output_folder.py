"""The output folder: may this run use it, does it go on with an earlier one, and what may be removed from it.

A run keeps `run.json` in its folder: its id, the script, its arguments and whether it came to its end. The id is in the
manifest of each of its checkpoints, too.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils import checkpoint, dry_run, sharded_checkpoint, sharding
from utils.errors import UsageError
from utils.main_process import told_by_main

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
# Arguments that change what is told about a run, not what it computes.
REPORTING_ARGUMENTS = re.compile(
    r"log_level.*|logging_.*|report_to|run_name|disable_tqdm|project|trackio_.*|overwrite_output_dir|output_dir|"
    r"resume_from_checkpoint|push_to_hub.*|hub_.*|ddp_timeout|save_on_signal|max_train_time|max_bad_steps|on_loss_spike|"
    r"save_total_limit|async_save|elastic|dry_run|print_config"
)
# What a run of ours writes, by name: into its folder, into that and its checkpoints, and into the folders under runs/.
# Anything else belongs to somebody else.
RESULT_FILES = re.compile(
    r"run\.json|\.run\.json\.tmp|results\.md|\.?report\.(html|json)(\.tmp)?|(all|train|eval)_results\.json|README\.md"
)
MODEL_FILES = re.compile(
    r"trainer_state\.json|training_args\.bin|(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|"
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"spiece\.model|sentencepiece\.bpe\.model|chat_template\.jinja|"
    r"optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|manifest\.json|progress_\d+\.json|"
    r"data_state_\d+\.json"
)
# Weights and training state, ours or of others.
TRAINED_FILES = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|trainer_state\.json"
)
EVENT_FILES = re.compile(r"events\.out\.tfevents\..*")
SHARED_SECONDS = 10.0  # until a network's file system shows on one node what another has written
AUTO = "auto"  # --resume_from_checkpoint auto
SOURCES = ("model_name_or_path", "tokenizer_name", "config_name")  # flags that may name a folder here


@dataclass(frozen=True)
class Claim:
    """What to do in the folder: "start", "resume" from `checkpoint`, or nothing, since the run is "finished"."""

    verdict: str
    checkpoint: str | None = None
    note: str | None = None


def claim(
    output_dir: str, script: str, arguments: dict, overwrite: bool, resume: str | None, processes: int | None = 1
) -> Claim:
    """Decides how a run may use its output folder. Reads only: several processes may ask at once.

    output_dir: the folder, which need not exist.
    arguments: {flag: value} of the whole command line, JSON types only.
    resume: --resume_from_checkpoint. A folder is what the user answers for: the arguments may then differ. "auto" is what
        happens without the flag, too: the newest whole checkpoint of the same run.
    processes: how many take part, which must be as many as wrote the checkpoint; None for any number.

    Raises UsageError if the folder holds another run, naming the first flag that differs, or files of somebody else's that
    the run would write over, if it cannot be written to, if `overwrite` would remove what the run starts from, and if
    `resume` is no checkpoint, a damaged one, or one that `overwrite` removes.
    """
    folder = Path(output_dir)
    _check_writable(folder)
    source = _source_within(folder, arguments)
    if overwrite and source is not None and (folder / RUN_FILE).exists():
        raise UsageError(
            f"--overwrite_output_dir: would remove --{source} {arguments[source]}, which this run starts from; name another "
            "--output_dir"
        )
    if resume == AUTO and overwrite:
        raise UsageError(
            "--resume_from_checkpoint auto: --overwrite_output_dir removes the checkpoints; leave one of the two flags out"
        )
    if resume not in (None, AUTO):
        _check_resume(folder, resume, overwrite)
        checkpoint.check_named(resume, processes)
        return Claim("resume", resume)
    nothing = f"{output_dir}: there is no checkpoint to resume from; starting anew" if resume == AUTO else None
    if not folder.is_dir() or overwrite:
        return Claim("start", note=nothing)
    if not (folder / RUN_FILE).exists():
        stranger = _stranger(folder, source is not None)
        if stranger is not None:
            raise UsageError(
                f"--output_dir {output_dir}: holds {stranger}, but no run of these scripts; name another folder, or add "
                "--overwrite_output_dir to write over it"
            )
        return Claim("start", note=nothing)
    record = _read_record(folder)
    anew = ", or add --overwrite_output_dir to start anew" if source is None else ""
    if record["script"] != script:
        raise UsageError(
            f"--output_dir {output_dir}: is the output of {record['script']}, not of {script}; name another folder{anew}"
        )
    difference = first_difference(record["arguments"], arguments)
    if difference is not None:
        name, before, now = difference
        raise UsageError(
            f"--output_dir {output_dir}: holds a run with --{name} {before}, this one has {now}; name another folder{anew}"
        )
    if record["finished"]:
        return Claim(
            "finished",
            note=f"{output_dir}: this run is finished already, nothing to do; --overwrite_output_dir starts it anew",
        )
    newest = checkpoint.newest(folder, record["run"])
    if newest is None:
        return Claim(
            "start", note=f"{output_dir}: an earlier start of this run left no whole checkpoint; starting anew"
        )
    checkpoint.check_processes(newest, processes)
    return Claim("resume", str(newest), note=f"{output_dir}: this run is unfinished; resuming from {newest.name}")


def claim_for_all(args, script: str, arguments: dict) -> Claim:
    """`claim` by the main process, with its verdict told to all of them; says what it found.

    args: the run's LanguageModelingArguments. Raises the same UsageError on every rank.
    """
    if _was_started_again(args):
        _go_on_after_restart(args)

    def recover_and_claim() -> Claim:
        checkpoint.recover(args.output_dir)
        found = claim(
            args.output_dir,
            script,
            arguments,
            args.overwrite_output_dir,
            args.resume_from_checkpoint,
            None if args.elastic else args.world_size,
        )
        if found.checkpoint is not None:
            sharded_checkpoint.check_engine(found.checkpoint, sharding.engine_flag(args))
        return found

    verdict = told_by_main(recover_and_claim)
    if verdict.note and args.process_index == 0:
        logger.warning(verdict.note)
    if args.dry_run:
        dry_run.begin(args)  # from here on nothing goes to the folder
    return verdict


def _was_started_again(args) -> bool:
    """Whether any rank was, by torchrun or by launch.sh: a node that came back begins to count anew."""
    count = sum(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "LAUNCH_RESTARTS"))
    if args.world_size > 1:
        from accelerate.utils import gather_object

        count = sum(gather_object([count]))
    return count > 0


def _go_on_after_restart(args) -> None:
    """A run that a launcher has started again goes on with what it did so far, whatever it was to begin with."""
    folder = Path(args.output_dir)
    if (folder / RUN_FILE).exists():
        args.overwrite_output_dir = False
        if checkpoint.newest(folder, run_id(folder)) is not None:
            args.resume_from_checkpoint = None


def begin(output_dir: str, script: str, arguments: dict, overwrite: bool, tokens: int | None = None) -> None:
    """Clears what an earlier run of ours wrote, if `overwrite`, and records the new run; a run that goes on keeps its id.
    What a killed save left is removed. For one process to call.

    tokens: of the training text. A run that goes on with more or fewer of them says so.

    To be called last before training, when text, flags and model are known to be good and the repository of --push_to_hub
    is there: a run that failed on a typo has not used its folder.
    """
    folder = Path(output_dir)
    earlier = _readable_record(folder)
    run = None if overwrite else earlier["run"]
    if (folder / RUN_FILE).exists():
        foreign, before = earlier["foreign"], earlier["tokens"]
        if run is not None and None not in (before, tokens) and before != tokens:
            logger.warning(
                "the training text has %d tokens, and had %d when this run began: it goes on with other text",
                tokens,
                before,
            )
        if overwrite:
            remove_own_files(folder, foreign)
        checkpoint.discard_leftovers(folder)
    else:
        # Somebody else's: neither to be resumed nor to be removed.
        foreign = sorted(entry.name for entry in _checkpoints(folder))
    record = {"run": run or secrets.token_hex(8), "script": script, "arguments": arguments, "finished": False}
    _write_record(folder, {**record, "tokens": tokens, "foreign": foreign})


def begin_for_all(args, script: str, arguments: dict, figures: dict | None = None) -> None:
    """`begin` by the main process. args: the run's LanguageModelingArguments. figures: of its text, from make_samples.

    Raises UsageError on all ranks if there are several nodes and one of them does not see the folder: each rank has files
    of its own in a checkpoint.
    """
    if args.process_index == 0:
        tokens = (figures or {}).get("data_tokens")
        begin(args.output_dir, script, arguments, args.overwrite_output_dir, tokens)
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if nodes > 1 and args.world_size > 1 and args.save_strategy != "no":
        _check_shared(args)


def _check_shared(args) -> None:
    from accelerate.utils import broadcast_object_list, gather_object

    [run] = broadcast_object_list([run_id(args.output_dir)])
    end = time.monotonic() + SHARED_SECONDS
    while run_id(args.output_dir) != run and time.monotonic() < end:
        time.sleep(0.2)
    here = f"rank {args.process_index} on {socket.gethostname()}"
    blind = [rank for rank in gather_object([None if run_id(args.output_dir) == run else here]) if rank is not None]
    if blind:
        raise UsageError(
            f"--output_dir {args.output_dir}: {blind[0]} does not see what rank 0 has written there; name a folder that all "
            "nodes share, or add --save_strategy no"
        )


def finish(output_dir: str) -> None:
    """Records that the run came to its end. For one process to call, after everything is written."""
    folder = Path(output_dir)
    _write_record(folder, {**_read_record(folder), "finished": True})
    with contextlib.suppress(OSError):  # there is none, or something of somebody else's is in it
        (folder / checkpoint.STAGING).rmdir()


def first_difference(before: dict, now: dict) -> tuple[str, object, object] | None:
    """(flag, earlier value, new value) of the first argument that differs, arguments about reporting aside."""
    for name in now:
        if not REPORTING_ARGUMENTS.fullmatch(name) and name in before and before[name] != now[name]:
            return name, before[name], now[name]
    return None


def run_id(output_dir: str | Path) -> str | None:
    """The id of the run whose folder it is; None where there is none, or one of an earlier version."""
    return _readable_record(Path(output_dir))["run"]


def _checkpoints(folder: Path) -> list[Path]:
    return [e for e in folder.glob("checkpoint-*") if checkpoint.NAME.fullmatch(e.name) and e.is_dir()]


def _is_complete(folder: Path) -> bool:
    """Whether a checkpoint that may have no manifest was written to its end: trainer_state.json comes last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return True
    except (OSError, ValueError):
        return False


def remove_own_files(folder: Path, foreign: Sequence[str] = ()) -> None:
    """Removes what a run of ours wrote, by name; other people's files stay, in checkpoint folders too.

    foreign: names of checkpoints that another program left.
    """
    for entry, manifest in checkpoint.own(folder, run_id(folder)):
        checkpoint.remove_files(entry, [checkpoint.MANIFEST, *manifest.files])
    _remove_files(folder, RESULT_FILES, MODEL_FILES)
    for entry in _checkpoints(folder):
        if entry.name not in foreign and not entry.is_symlink():
            _remove_files(entry, MODEL_FILES)
            _remove_empty(entry)
    logs = folder / "runs"
    if logs.is_dir() and not logs.is_symlink():
        for log in sorted(logs.iterdir()):
            if log.is_dir() and not log.is_symlink():
                _remove_files(log, EVENT_FILES)
                _remove_empty(log)
        _remove_empty(logs)


def _remove_files(folder: Path, *names: re.Pattern) -> None:
    for entry in sorted(folder.iterdir()):
        if (entry.is_symlink() or entry.is_file()) and any(name.fullmatch(entry.name) for name in names):
            entry.unlink()


def _remove_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def _check_writable(folder: Path) -> None:
    absolute = folder.absolute()
    try:
        there = next(path for path in (absolute, *absolute.parents) if path.is_symlink() or path.exists())
    except OSError as error:  # a name that is too long
        raise UsageError(f"--output_dir {folder}: {error.strerror}; name another folder") from error
    if not there.is_dir():
        what = "a link to no folder" if there.is_symlink() else "a file, no folder can be in it"
        raise UsageError(f"--output_dir {folder}: {there} is {what}; name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--output_dir {folder}: {there} may not be written to; name another folder")


def _source_within(folder: Path, arguments: dict) -> str | None:
    """The flag by which the run starts from something in the folder, or from the folder itself."""
    for flag in SOURCES:
        named = arguments.get(flag)
        if named and os.path.exists(named):
            found = Path(named).resolve()
            if folder.resolve() in (found, *found.parents):
                return flag
    return None


def _stranger(folder: Path, is_source: bool) -> str | None:
    """A file or a checkpoint that the run would write over. is_source: the run starts from a tokenizer or a configuration
    there, which it may write again."""
    names = [TRAINED_FILES] if is_source else [TRAINED_FILES, RESULT_FILES, MODEL_FILES]
    found = [entry.name for entry in folder.iterdir() if any(name.fullmatch(entry.name) for name in names)]
    found += [entry.name for entry in folder.glob("checkpoint-*")]
    return min(found, key=lambda name: (TRAINED_FILES.fullmatch(name) is None, name), default=None)


def _check_resume(folder: Path, resume: str, overwrite: bool) -> None:
    if (Path(resume) / RUN_FILE).exists():
        raise UsageError(
            f"--resume_from_checkpoint {resume}: is the output folder of a run, not a checkpoint; name a folder checkpoint-N "
            "in it, or leave the flag out: a run goes on from its newest checkpoint by itself"
        )
    if not _is_complete(Path(resume)):
        raise UsageError(
            f"--resume_from_checkpoint {resume}: is no checkpoint, it has no trainer_state.json; name a folder "
            "checkpoint-N, or leave the flag out: a run goes on from its newest checkpoint by itself"
        )
    if overwrite and folder.resolve() in Path(resume).resolve().parents:
        raise UsageError(
            f"--resume_from_checkpoint {resume}: --overwrite_output_dir removes it; leave one of the two flags out"
        )


def _read_record(folder: Path) -> dict:
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return {
            "run": record.get("run"),
            "script": str(record["script"]),
            "arguments": dict(record["arguments"]),
            "finished": bool(record["finished"]),
            "tokens": record.get("tokens"),
            "foreign": list(record.get("foreign", [])),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder / RUN_FILE}: cannot be read, so the run in this folder is unknown; name another --output_dir, or "
            "remove the file"
        ) from error


def _readable_record(folder: Path) -> dict:
    """The record; where there is none that can be read, what is known without: nothing."""
    try:
        return _read_record(folder)
    except UsageError:
        return {"run": None, "tokens": None, "foreign": []}


def _write_record(folder: Path, record: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RUN_FILE}.tmp"
    temporary.write_text(json.dumps(record, indent=2), encoding="utf-8")
    os.replace(temporary, folder / RUN_FILE)
