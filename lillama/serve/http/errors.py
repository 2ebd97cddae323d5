"""Errors as OpenAI's API words them: {"error": {message, type, param, code}} and a status."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ApiError", "error_body", "explain_validation"]


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        status: HTTP status.
        message: one line for a person.
        code: for a program, such as "context_length_exceeded".
        param: the field of the request that is to blame.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def error_body(error: ApiError) -> bytes:
    return json.dumps(error.document()).encode("ascii")


def explain_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """A 400 about the first of pydantic's errors; what was sent is quoted only where it is short.

    Args:
        errors: of FastAPI's RequestValidationError: `loc` begins with "body".
    """
    first = errors[0]
    # pydantic adds the names of types that it tried, such as list[str]
    place = [str(part) for part in first["loc"][1:] if re.fullmatch(r"\w+", str(part))]
    if len(place) > 1 and place[-1] in ("str", "list"):
        place.pop()
    param = ".".join(place) or None
    kind = first["type"]
    if kind == "json_invalid":
        detail = first.get("ctx", {}).get("error", "unreadable")
        return ApiError(400, f"the body is not valid JSON: {detail}", code="invalid_json")
    if kind == "missing" and param is None:
        return ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
    if param is None and kind != "value_error":
        return ApiError(400, "the body must be a JSON object", code="invalid_json")
    if kind == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_field")
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", param=param, code="unknown_field")
    if kind == "value_error":
        error = first["ctx"]["error"]
        if isinstance(error, ApiError):
            return error
        return ApiError(400, f"{param}: {error}" if param else str(error), param=param)
    message = str(first["msg"])
    got = first.get("input")
    if got is None or isinstance(got, bool | int | float | str):
        shown = repr(got)
        message += f", got {shown if len(shown) <= 60 else shown[:57] + '...'}"
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
