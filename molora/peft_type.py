"""The PEFT type `MOLORA`: one more member of PEFT's enum, added at import because PEFT has no other door for it."""

from __future__ import annotations

from peft import PeftType


def _extend_peft_type(name: str) -> PeftType:
    """Add a member to the enum `PeftType`, or return the one that is there.

    `register_peft_method` insists on a member, and PEFT and transformers read `.value` of it.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]  # what EnumType sets on its members
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]  # as above
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    hashable = getattr(PeftType, "_hashable_values_", None)  # a second look-up list, from Python 3.12 on
    if isinstance(hashable, list):
        hashable.append(name)
    type.__setattr__(PeftType, name, member)  # EnumType refuses to set members
    return member


MOLORA = _extend_peft_type("MOLORA")
"""The type written as `peft_type` into every adapter config."""
