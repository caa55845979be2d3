"""What the built package says of the project that the repository says otherwise: its address, and README's links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# ![words](docs/picture.svg) and [words](docs/page.md#part), where the address is a path of the repository.
PICTURE = re.compile(r"(!\[[^\]]*\]\()(?![a-z]+:|#)([^)\s]+)")
LINK = re.compile(r"((?<!!)\[[^\]]*\]\()(?![a-z]+:|#)([^)\s]+)")


def absolute(text: str, repository: str) -> str:
    """Return Markdown whose pictures and links lead into the repository from anywhere."""
    text = PICTURE.sub(rf"\1{repository}/raw/main/\2", text)
    return LINK.sub(rf"\1{repository}/blob/main/\2", text)


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
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(readme, repository)}
        metadata["urls"] = urls(repository)
