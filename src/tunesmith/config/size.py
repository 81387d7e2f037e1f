"""Sizes in bytes, as people write them: 5GB, 500 MiB, 1000000."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(I?)B?|(\d+)\s*B?", re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes that `text` means: GB counts in thousands, GiB in 1024s, a number alone is bytes.

    Raises:
        ValueError: it is no size, or less than a byte.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    size = 0
    if match and match[4]:
        size = int(match[4])
    elif match:
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1))
    if size < 1:
        raise ValueError("it must be a size of at least a byte, as 5GB, 500MiB or 1000000")
    return size


def _check_size(value: str) -> str:
    parse_size(value)
    return value


def _number_as_text(value: Any) -> Any:
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if is_whole and not isinstance(value, bool) else value


Size = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_check_size)]
