"""The pictures of one call, and what makes each of them again."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, refuse_no_path, shown

if TYPE_CHECKING:
    from PIL.Image import Image

Images = TypeVar("Images")


@dataclass(frozen=True)
class Result(Generic[Images]):
    """What `pipe(...)` returns; in a notebook it shows itself.

    `images`: a list of PIL images. With `output_type="np"` it is float32 [images, height, width, 3] in 0..1, and with
    "latent" float32 [images, channels, latent_height, latent_width].
    `seeds`: the seed of each image. `parameters`: what makes each image again, as its PNG carries it.
    """

    images: Images
    seeds: tuple[int, ...]
    parameters: tuple[dict[str, Any], ...]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the pictures as PNG, JPEG or WebP files that carry their parameters. Returns the paths.

        One picture is written to `path`, several to apple-0.png, apple-1.png, ... beside it. A file that exists is
        replaced and keeps its mode, a link is followed, and a read-only file is left as it is.
        Raises: UsageError for latents, for NaN, for another kind of file, for a folder that does not exist, or where
        `images` and `parameters` differ in number; SdoptError that names the files that cannot be written, after all
        others were.
        """
        from sdopt.image.files import format_of, refuse_lost, save_each  # late: `import sdopt` needs no Pillow
        from sdopt.image.pil import numbered

        refuse_no_path("path", path)
        target = Path(path)
        format_of(target)
        if not target.absolute().parent.is_dir():
            raise UsageError(f"save({shown(str(path))}): there is no folder {target.parent}; make it first")
        pictures = self._pictures()
        if not pictures or len(pictures) != len(self.parameters):
            text = f"images: {len(pictures)} pictures, and parameters of {len(self.parameters)}"
            raise UsageError(f"{text}; allowed is one for each. Save others with Pillow: image.save(path)", "images")
        paths = numbered(target, len(pictures))
        refuse_lost(save_each(zip(pictures, paths, self.parameters, strict=True)), len(paths))
        return list(paths)

    def _pictures(self) -> list[Image]:
        """The images as PIL images. Raises: UsageError for latents, and for values that no picture has."""
        from PIL.Image import Image

        from sdopt.image.pil import unit_shades, unit_to_pil

        images: Any = self.images
        if isinstance(images, list):
            pictures = cast(list[Any], images)
            for other in (one for one in pictures if not isinstance(one, Image)):
                raise UsageError(f"images: {shown(other)} is no picture; allowed are PIL images", "images")
            return pictures
        if getattr(images, "ndim", 0) != 4 or images.shape[-1] != 3:
            text = f"latents {shown(images)} are no pictures; leave out output_type, or use pipe.decode(...)"
            raise UsageError(text, "images")
        return unit_to_pil(unit_shades("images", images)) if len(images) else []

    def _repr_png_(self) -> bytes | None:
        """The pictures side by side, as notebooks show them; None for latents, and for no pictures."""
        from PIL import Image

        try:
            pictures = self._pictures()
        except UsageError:
            return None
        if not pictures:
            return None
        row = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
        left = 0
        for picture in pictures:
            row.paste(picture, (left, 0))
            left += picture.width
        content = io.BytesIO()
        row.save(content, format="PNG")
        return content.getvalue()

    def __repr__(self) -> str:
        images: Any = self.images
        count = len(self.seeds)
        what = f"{images.dtype} {list(images.shape)}" if hasattr(images, "dtype") else f"{count} PIL images"
        return f"<Result: {what}, seeds {', '.join(map(str, self.seeds))}>"
