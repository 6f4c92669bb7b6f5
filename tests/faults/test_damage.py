"""A checkpoint whose files are damaged is named and stepped over to the same bits (INV-46)."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from faults.harness import KINDS, Home, tried

HOW = {
    "deleted": lambda content: None,
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a bit in the middle": lambda content: _flipped(content, len(content) // 2),
    "a bit near the end": lambda content: _flipped(content, len(content) - max(1, len(content) // 20)),
    "zeros": lambda content: bytes(len(content)),
}


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


@pytest.mark.faults
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "save_total_limit" not in KINDS[kind].get("train", {})])
def test_every_file_of_the_newest_checkpoint(nursery, tmp_path, kind):
    home = Home(nursery, tmp_path / "home", kind)
    changes = home.unbroken()
    home.clear()
    # The first change of a file after the last checkpoint has its name.
    number = max(n for n, operation, path in changes if operation == "os.rename" and ".writing/checkpoint-" in path)
    killed = home.run(watch={"below": str(home.path), "kill": number + 2})
    assert killed["code"] == -signal.SIGKILL
    kept = Path(shutil.copytree(home.out, tmp_path / "kept"))
    newest = max(home.out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])).name
    files = [path.relative_to(kept / newest) for path in sorted((kept / newest).rglob("*")) if path.is_file()]
    assert len(files) > 8
    for place, file in enumerate(files):
        # Two ways for each file, so that six files have them all.
        for how in (list(HOW)[place % 6], list(HOW)[(place + 3) % 6]):
            shutil.rmtree(home.out)
            shutil.copytree(kept, home.out)
            path = home.out / newest / file
            content = HOW[how](path.read_bytes())
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
            done = home.run("--resume")
            assert done["code"] == 0, (file, how, done["said"])
            assert "is passed over" in done["said"], (file, how)
            home.require_same(f"{kind}: {file} {how}")
            tried("a file of the newest checkpoint damaged")
