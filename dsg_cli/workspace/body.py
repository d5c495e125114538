"""What headers and bodies of artifacts have in common: base classes, and types of their fields.

A field of an artifact is a plain value, a list of them, or a JSON object. What lies in an object stays the object that
it was, with the order of its keys, for readers take any metric out of it by name; the `Shape` of such a field says what
it must look like, and is checked whenever an artifact is made or read. Nothing is converted: a string is no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import core_schema

Json = dict[str, Any]

BOUND = 2**63

Whole = Annotated[int, Field(ge=-BOUND, lt=BOUND)]

Number = Annotated[float, Field(gt=-BOUND, lt=BOUND, allow_inf_nan=False)]

Finite = Annotated[float, Field(allow_inf_nan=False)]

Empty = Annotated[Json, Field(max_length=0)]


class Part(BaseModel):
    """An artifact's header, body, or JSON object in one of them; where a field has a default, it may be missing.

    Fields that it does not know are ignored: an earlier version reads past what a later one adds.
    """

    model_config = ConfigDict(strict=True, frozen=True, serialize_by_alias=True, defer_build=True)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, which are not checked."""
        return self.model_copy(update=changes)


@dataclass(frozen=True)
class Shape:
    """Marks a field of JSON that is checked as if it were of a type, and kept as it is."""

    type: Any

    def __get_pydantic_core_schema__(self, _source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def checked(value: Any, check: core_schema.ValidatorFunctionWrapHandler) -> Any:
            check(value)
            return value

        return core_schema.no_info_wrap_validator_function(
            checked, handler.generate_schema(self.type), serialization=core_schema.simple_ser_schema("any")
        )


class Body(Part):
    """What an artifact says, but for where it came from."""

    kind: ClassVar[str]
    schema_number: ClassVar[int] = 1
    made_by: ClassVar[str]
    next_command: ClassVar[str] = "dsg report"
    settings_shape: ClassVar[type[Part]] = Part
    """Of `settings` in the header."""

    @classmethod
    def migrate(cls, data: Json) -> Json:
        """An artifact's JSON object in the newest schema, where defaults of fields do not suffice."""
        return data
