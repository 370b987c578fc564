"""An item as the catalogue topic and Redis hold it."""

from __future__ import annotations

from typing import Final

import msgspec

# Names are for people; anything longer is a description that belongs elsewhere.
NAME_CHARS_MAX: Final = 512


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One catalogue entry. `original_id` keeps a string id that was hashed at the edge."""

    item_id: int
    name: str
    categories: tuple[str, ...] = ()
    available: bool = True
    original_id: str | None = None


_DECODER: Final = msgspec.json.Decoder(Item)


def encode_item(item: Item) -> bytes:
    """Return the item's JSON."""
    return msgspec.json.encode(item)


def decode_item(raw: bytes) -> Item:
    """Return the item in `raw`.

    Raises:
        msgspec.MsgspecError: not an item.
    """
    return _DECODER.decode(raw)
