"""Hooks of the site: pages link to files of the repository, which the site does not hold; such links become names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace links that leave the folder of the pages by the name of the file, which must exist.

    Raises:
        FileNotFoundError: a page links to a file that the repository does not have.
    """
    place = Path(page.file.abs_src_path).parent

    def name(link: re.Match[str]) -> str:
        target = (place / link[2]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {link[2]}, which does not exist.")
        return f"{link[1]} (`{target.relative_to(Path(config.config_file_path).parent)}` in the repository)"

    return _LINK.sub(name, markdown)
