"""What the built package says of the project that the repository says otherwise: its address, and README's links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

FENCED = re.compile(r"(^```.*?^```)", re.S | re.M)
# ![words](docs/picture.svg) and [words](docs/page.md#part).
REFERENCE = re.compile(r"(!?)(\[[^\]]*\])\(([^)\s#]+)(#[^)\s]*)?\)")


def absolute(text: str, repository: str, root: Path) -> str:
    """Return Markdown whose pictures and links to files of the repository lead there from anywhere."""

    def lead(found: re.Match[str]) -> str:
        picture, words, path, part = found.groups("")
        if not (root / path).exists():
            return found[0]
        return f"{picture}{words}({repository}/{'raw' if picture else 'blob'}/main/{path}{part})"

    parts = FENCED.split(text)
    parts[::2] = [REFERENCE.sub(lead, prose) for prose in parts[::2]]
    return "".join(parts)


def urls(repository: str) -> dict[str, str]:
    """Return the addresses that follow from that of the repository."""
    return {
        "Repository": repository,
        "Documentation": f"{repository}/blob/main/docs/index.md",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


class Face(MetadataHookInterface):
    """Gives the package its long description and its addresses, out of one line of pyproject.toml."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add what is dynamic."""
        repository = str(self.config["repository"]).rstrip("/")
        readme = (Path(self.root) / "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(readme, repository, Path(self.root))}
        metadata["urls"] = urls(repository)
