"""Shows what a run came to, in the lines that the logs of Ascend's ModelZoo end with: used by launch.sh.

python scripts/show_results.py OUTPUT_FOLDER START      START: when the run began, in seconds since 1970
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    output, start = Path(sys.argv[1]), int(sys.argv[2])
    results, row = output / "all_results.json", output / "results.md"
    run = output / "run.json"
    if run.exists() and not json.loads(run.read_text(encoding="utf-8"))["finished"]:
        print("the run is not finished; the same command goes on from its newest checkpoint")
        return
    found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    print("------------------ Final result ------------------")
    print(f"Final Performance samples/sec : {shown(found.get('fps'), '.3f')}")
    print(f"Final Train Accuracy : {shown(found.get('eval_accuracy'), '.4f')}")
    if found and results.stat().st_mtime < start:
        print("E2E Training Duration sec : n/a (the run was finished before)")
    else:
        print(f"E2E Training Duration sec : {int(time.time()) - start}")
    if row.exists():
        print(row.read_text(encoding="utf-8"), end="")


def shown(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


if __name__ == "__main__":
    main()
