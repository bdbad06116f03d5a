"""What a build adds to the metadata: the first page with links that work outside of the repository, as on an index."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

REPOSITORY = "https://github.com/sdopt/sdopt"
PICTURE = r"\.(?:png|jpg|svg|gif)"


def absolute(page: str, branch: str = "main") -> str:
    """The page with each link and picture of the repository as an address."""
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + f"/{branch}/"
    page = re.sub(rf"(\]\()(?!https?:|#)([^)\s]+{PICTURE}\))", rf"\g<1>{raw}\2", page)
    page = re.sub(rf'(src=")(?!https?:)([^"]+{PICTURE}")', rf"\g<1>{raw}\2", page)
    return re.sub(r"(\]\()(?!https?:|#)([^)\s]+\))", rf"\g<1>{REPOSITORY}/blob/{branch}/\2", page)


class Hook(MetadataHookInterface):
    """Declares the page, which pyproject.toml therefore names as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        page = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(page)}
