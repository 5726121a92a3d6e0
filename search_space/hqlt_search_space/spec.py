"""The base of every value in this package: frozen, closed, with one canonical JSON form."""

import hashlib
import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A frozen value. Unknown keys are refused, and two equal values have the same `canonical_json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def canonical_json(self) -> str:
        """The value as JSON with sorted keys and no spaces: what identifiers are hashed from."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The value written by `canonical_json` or `model_dump_json`.

        Raises:
            pydantic.ValidationError: the text is not JSON or does not describe this value.
        """
        return cls.model_validate_json(text)


def canonical_json(data: Any) -> str:
    """`data` as JSON with sorted keys and without spaces; NaN and infinities are refused.

    >>> canonical_json({"b": 1, "a": [1.0, None]})
    '{"a":[1.0,null],"b":1}'
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def short_hash(text: str, digits: int = 16) -> str:
    """The first `digits` hexadecimal digits of SHA-256 of `text`.

    Sixteen digits are 64 bits: among a million values the chance of one collision is 3e-8.
    """
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:digits]
