"""One process of `test_cache.py`: prepares rows that another process asks for at the same time, and counts the work.

cache_worker.py FOLDER RANK PROCESSES [die]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.samples import byte_level, pair
from tether.data.prepare import cache


def main(folder: Path, rank: int, processes: int, *, die: bool) -> None:
    counts = []
    plain, write = cache.prepare, cache._write

    def slow(*arguments: Any, **options: Any) -> Any:
        counts.append(1)
        time.sleep(2)  # long enough for the other process to ask, too
        return plain(*arguments, **options)

    def half(prepared: Any, path: Path) -> None:
        path.with_name(f"{path.stem}.half.tmp").write_bytes(b"half of it")
        time.sleep(600)
        write(prepared, path)

    slow.__kwdefaults__ = plain.__kwdefaults__
    cache.prepare, cache._write = slow, half if die else write
    rows = [pair(f"{n} + {n} =", f" {2 * n}", f" {n}{n}") for n in range(3000)]
    (folder / f"ready{rank}").touch()
    while len(list(folder.glob("ready*"))) < processes:
        time.sleep(0.01)
    found = cache.prepare_cached(rows, byte_level(eos_token="<eos>"), folder=folder / "entries", max_length=16)
    digests = [one.hex() for one in (*found.row_digests, *found.prompt_digests)]
    told = {"prepared": len(counts), "fingerprint": found.report.fingerprint, "digests": digests}
    print(json.dumps({**told, "report": found.report.to_dict()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), die=sys.argv[4:] == ["die"])
