"""OpenAPI 3.1 from declared endpoints and the types of ``wire``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from madang.manager.http.endpoint import Endpoint
from madang.wire.api import Problem
from madang.wire.errors import catalogue

_REF: Final = "#/components/schemas/{name}"
_IN_PATH: Final = re.compile(r"{(\w+)}")


def describe(endpoints: Sequence[Endpoint], *, title: str, version: str) -> dict[str, Any]:
    """The whole document."""
    types = [Problem]
    for endpoint in endpoints:
        types += [t for t in (endpoint.body, endpoint.returns) if t is not None]
        types += endpoint.websocket or ()
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = {repr(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint, by_type)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    components["Problem"]["properties"]["code"]["enum"] = sorted(catalogue())
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "license": {"name": "Apache-2.0"}},
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "signature": {"type": "apiKey", "in": "header", "name": "Authorization"},
                "browser": {"type": "apiKey", "in": "cookie", "name": "madang"},
            },
            "responses": {
                "Problem": {
                    "description": "What failed, on which object, and what to do.",
                    "content": {"application/problem+json": {"schema": by_type[repr(Problem)]}},
                }
            },
        },
    }


def _operation(endpoint: Endpoint, schemas: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "security": [{"token": []}, {"signature": []}, {"browser": []}] if endpoint.auth else [],
        "responses": {
            str(101 if endpoint.websocket else endpoint.status): _answer(endpoint, schemas),
            "default": {"$ref": "#/components/responses/Problem"},
        },
    }
    if endpoint.auth:
        operation["x-scope"] = endpoint.scope
    for status in endpoint.also:
        answer = _answer(endpoint, schemas) if status < 300 else {"description": "No content."}
        operation["responses"][str(status)] = answer
    if parameters := _parameters(endpoint):
        operation["parameters"] = parameters
    if endpoint.sends:
        schema = {"type": "string", "contentMediaType": endpoint.sends}
        operation["requestBody"] = {"content": {endpoint.sends: {"schema": schema}}}
    elif endpoint.body is not None:
        content = {"application/json": {"schema": schemas[repr(endpoint.body)]}}
        operation["requestBody"] = {"content": content, "required": True}
    if endpoint.websocket:
        client, server = endpoint.websocket
        operation["x-websocket"] = {
            "clientMessage": schemas[repr(client)],
            "serverMessage": schemas[repr(server)],
            "binary": "to the server: stdin; from the server: offset (u64 LE) and log record",
        }
    return operation


def _answer(endpoint: Endpoint, schemas: dict[str, Any]) -> dict[str, Any]:
    if endpoint.websocket:
        return {"description": "The connection becomes a WebSocket."}
    if endpoint.streams:
        schema = {"type": "string", "contentMediaType": endpoint.streams}
        return {"description": "A stream.", "content": {endpoint.streams: {"schema": schema}}}
    if endpoint.returns is None:
        return {"description": "Done."}
    content = {"application/json": {"schema": schemas[repr(endpoint.returns)]}}
    return {"description": "The result.", "content": content}


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _IN_PATH.findall(endpoint.path)
    ]
    found += [
        {"name": name, "in": "header", "schema": {"type": "string"}} for name in endpoint.headers
    ]
    if endpoint.query is not None:
        schema = msgspec.json.schema(endpoint.query)
        schema = schema["$defs"][endpoint.query.__name__] if "$defs" in schema else schema
        for name, kind in schema.get("properties", {}).items():
            required = name in schema.get("required", [])
            found.append({"name": name, "in": "query", "required": required, "schema": kind})
    return found
