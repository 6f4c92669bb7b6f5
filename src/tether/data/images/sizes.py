"""How large images are when the processor gets them. Called by `inputs`, and where a run's processor is made.

The sizes lie on the image processor, which transformers saves with all that lies on it: whoever loads the processor
from the run folder, and reads images here, gets the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import ProcessorMixin

from tether.errors import ConfigError

_PLACE = "tether_image_sizes"
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
_KEYS = {
    "max_pixels": "a whole number from 1",
    "min_pixels": "a whole number from 1",
    "size": "a number of pixels, or [width, height]",
    "resample": ", ".join(_RESAMPLE),
}


def check_sizes(sizes: Mapping[str, Any] | None) -> None:
    """Refuse sizes that mean nothing.

    Args:
        sizes: `max_pixels` and `min_pixels`, which an image is made smaller or larger for; or `size`, to which each is
            brought: of a number of pixels, a square with black beside what does not fill it; `resample`: in which way,
            `bicubic` if left out.

    Raises:
        ConfigError: a key or a value is not known, or the two ways stand together.
    """
    for key, value in (sizes or {}).items():
        pair = isinstance(value, (list, tuple)) and len(value) == 2
        numbers = [*value] if pair else [value]
        whole = all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in numbers)
        right = value in _RESAMPLE if key == "resample" else whole and (not pair or key == "size")
        if key not in _KEYS or not right:
            words = _KEYS.get(key, f"one of {', '.join(_KEYS)} as a key")
            raise ConfigError(f"has {key}: {value!r}; allowed is {words}.", "image_sizes")
    if sizes and "size" in sizes and sizes.keys() & {"max_pixels", "min_pixels"}:
        raise ConfigError("has a size, which says more than max_pixels and min_pixels. Leave these out.", "image_sizes")
    if sizes and not sizes.keys() - {"resample"}:
        raise ConfigError("has a way to resample, and nothing that changes a size. Give max_pixels.", "image_sizes")


def use_sizes(processing: Any, sizes: Mapping[str, Any] | None) -> None:
    """Bring images to these sizes from now on; see `check_sizes` for what may be given.

    Args:
        processing: a processor, changed in place.
        sizes: None: as they are, or as the processor was saved with.

    Raises:
        ConfigError: it reads no images.
    """
    if sizes is None:
        return
    if not isinstance(processing, ProcessorMixin) or not hasattr(processing, "image_processor"):
        raise ConfigError(
            f"is given, and {type(processing).__name__} reads no images. Leave it out, or name a model that sees them.",
            "image_sizes",
        )
    setattr(processing.image_processor, _PLACE, dict(sizes))


def sized(image: Any, processor: Any) -> Any:
    """An image of Pillow as the processor is to get it."""
    sizes: dict[str, Any] = getattr(processor.image_processor, _PLACE, None) or {}
    way, size = _RESAMPLE[sizes.get("resample", "bicubic")], sizes.get("size")
    if isinstance(size, int):
        factor = size / max(image.width, image.height)
        image = image.resize(tuple(max(1, round(side * factor)) for side in image.size), resample=way)
        left, top = (round((size - side) * 0.5) for side in image.size)
        return image.crop((-left, -top, size - left, size - top))  # black where there is no image
    if size is not None:
        return image.resize(tuple(size), resample=way)
    pixels = image.width * image.height
    wanted = max(min(pixels, sizes.get("max_pixels", pixels)), sizes.get("min_pixels", 1))
    if wanted == pixels:
        return image
    factor = math.sqrt(wanted / pixels)
    return image.resize(tuple(max(1, int(side * factor)) for side in image.size), resample=way)
