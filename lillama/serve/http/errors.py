"""Errors as OpenAI's API words them: {"error": {message, type, param, code}} and a status."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

__all__ = ["ApiError", "error_response", "explain_validation"]


@dataclass(eq=False)
class ApiError(Exception):
    """An answer other than 200: message is one line for a person, code is for a program, param the
    field of the request that is to blame."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def error_response(error: ApiError, **headers: str) -> Response:
    return JSONResponse(error.document(), error.status, {**error.headers, **headers})


def explain_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return a 400 about the first of pydantic's errors, whose `loc` begins with "body"; what was
    sent is quoted only where it is short."""
    first = errors[0]
    # pydantic adds the names of types that it tried, such as list[str]
    place = [str(part) for part in first["loc"][1:] if re.fullmatch(r"\w+", str(part))]
    if len(place) > 1 and place[-1] in ("str", "list"):
        place.pop()
    param = ".".join(place) or None
    kind = first["type"]
    if kind == "json_invalid":
        detail = first.get("ctx", {}).get("error", "unreadable")
        return ApiError(400, f"the body is not valid JSON: {detail}", "invalid_json")
    if param is None:
        problem = "is empty; send" if kind == "missing" else "must be"
        return ApiError(400, f"the body {problem} a JSON object", "invalid_json")
    if kind == "missing":
        return ApiError(400, f"{param} is required", "missing_field", param)
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", "unknown_field", param)
    if kind == "value_error":
        return ApiError(400, f"{param}: {first['ctx']['error']}", None, param)
    message = str(first["msg"])
    got = first.get("input")
    if got is None or isinstance(got, bool | int | float | str):
        shown = repr(got)
        message += f", got {shown if len(shown) <= 60 else shown[:57] + '...'}"
    return ApiError(400, f"{param}: {message}", "invalid_value", param)
