"""Requests are made by an unprivileged process: nothing in them is believed before it is checked.

Each function returns a value of the right type or raises InvalidRequest that names the field.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from madang.wire import network, policy, policy_base, policy_live
from madang.wire.errors import InvalidRequest, NetworkInvalid, PolicyInvalid, SizeInvalid
from madang.wire.image import MAX_WARM, MODULE, ImageKind
from madang.wire.kernel import ExecSpec, ImageMount, KernelId, KernelSpec
from madang.wire.network import NO_NETWORK, Network, NetworkMode
from madang.wire.policy import (
    NO_SANDBOX,
    Access,
    Act,
    Answer,
    AnswerRule,
    Check,
    CountRule,
    FileRule,
    Look,
    NetRule,
    Resolved,
    Rule,
    Sandbox,
    WatchRule,
    When,
    WriteRule,
)
from madang.wire.session import RootMode
from madang.wire.size import Size
from madang.wire.size import check as check_size

T = TypeVar("T")

OPERATIONS: Final = frozenset(
    "hello list warm prepare start run guard kill freeze thaw settle remove files changes".split()
)
MAX_ARGUMENTS_BYTES: Final = 1024 * 1024
MAX_LAYERS: Final = 500
"""What overlayfs stacks."""
MIN_LOG_BYTES: Final = 64 * 1024

_KERNEL: Final = re.compile(r"[0-9a-z]{10,40}\.[0-9]{1,6}", re.ASCII)
_EXEC: Final = re.compile(r"[0-9a-z][0-9a-z-]{0,63}", re.ASCII)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_HOSTNAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?", re.ASCII)


def operation(value: object) -> str:
    if not isinstance(value, str) or value not in OPERATIONS:
        raise InvalidRequest(f"op: {str(value)[:40]!r} is unknown.")
    return value


def kernel_id(value: object) -> KernelId:
    if not (isinstance(value, str) and _KERNEL.fullmatch(value)):
        raise InvalidRequest(f"kernel: {str(value)[:60]!r} is no kernel id.")
    return KernelId.parse(value)


def exec_id(value: object) -> str:
    """A name of an exec's folder; ``main`` is taken."""
    if not (isinstance(value, str) and _EXEC.fullmatch(value)) or value == "main":
        raise InvalidRequest(f"exec: {str(value)[:60]!r} is no id of an exec.")
    return value


def kernel_spec(value: object) -> KernelSpec:
    fields = _Fields("spec", value)
    spec = KernelSpec(
        image=_image(fields.take("image")),
        size=_size(fields.take("size")),
        hostname=fields.pattern("hostname", _HOSTNAME, "session"),
        workspace=fields.optional_text("workspace"),
        grace_s=fields.number("grace_s", 0, 1e6, 10.0),
        log_limit_bytes=int(fields.number("log_limit_bytes", MIN_LOG_BYTES, 2**50, 2**26)),
        build=fields.flag("build"),
        sandbox=sandbox(fields.take("sandbox", None)),
        runtime=fields.text("runtime", 40, ""),
        network=_network(fields.take("network", None)),
        owner=fields.text("owner", 200, ""),
        root=RootMode(fields.choice("root", tuple(mode.value for mode in RootMode))),
        **_program(fields),
    )
    fields.end()
    if spec.root is not RootMode.READ_ONLY and spec.image.kind != ImageKind.ROOT:
        raise InvalidRequest(
            f"spec.root: {spec.image.name!r} is no image of a whole root: it can't be {spec.root}."
        )
    _check_arguments(spec.argv, spec.argv_encoding, spec.image.env, spec.env)
    return spec


def exec_spec(value: object) -> ExecSpec:
    fields = _Fields("spec", value)
    spec = ExecSpec(**_program(fields))
    fields.end()
    if not spec.argv:
        raise InvalidRequest("spec.argv: an exec needs a program.")
    _check_arguments(spec.argv, spec.argv_encoding, spec.env)
    return spec


def argv_bytes(argv: tuple[str, ...], encoding: str) -> list[bytes]:
    """The arguments as the program gets them."""
    return [argument.encode(encoding) for argument in argv]


def _program(fields: _Fields) -> dict[str, Any]:
    cwd = fields.text("cwd", 4096, "/work")
    if not cwd.startswith("/") or "\0" in cwd:
        raise InvalidRequest(f"spec.cwd: {cwd[:60]!r} must be an absolute path.")
    try:
        os.fsencode(cwd)
    except UnicodeEncodeError as exc:
        raise InvalidRequest(f"spec.cwd: {cwd[:60]!r} can't be a path.") from exc
    return {
        "argv": fields.texts("argv"),
        "argv_encoding": fields.choice("argv_encoding", ("utf-8", "latin-1")),
        "env": fields.environment("env"),
        "cwd": cwd,
        "tty": fields.flag("tty"),
        "stdin": fields.flag("stdin"),
        "rows": int(fields.number("rows", 1, 65535, 24)),
        "cols": int(fields.number("cols", 1, 65535, 80)),
    }


def _image(value: object) -> ImageMount:
    fields = _Fields("image", value)
    image = ImageMount(
        name=fields.text("name", 200, ""),
        digest=fields.text("digest", 64, ""),
        kind=fields.choice("kind", tuple(kind.value for kind in ImageKind)),
        layers=fields.texts("layers"),
        env=fields.environment("env"),
        warm=fields.texts("warm"),
        offers=fields.texts("offers"),
    )
    fields.end()
    if len(image.warm) > MAX_WARM or not all(map(MODULE.fullmatch, image.warm)):
        raise InvalidRequest(f"image.warm: must be at most {MAX_WARM} names of modules.")
    if image.kind == "host" and image.layers:
        raise InvalidRequest("image.layers: the host image has none.")
    if image.kind == ImageKind.ROOT and not image.layers:
        raise InvalidRequest("image.layers: a whole root has at least one.")
    if len(image.layers) > MAX_LAYERS or len(image.offers) > MAX_LAYERS:
        raise InvalidRequest(f"image.layers: {len(image.layers)}; the most is {MAX_LAYERS}.")
    for digest in (*image.layers, *image.offers):
        if not _DIGEST.fullmatch(digest):
            raise InvalidRequest(f"image.layers: {digest[:70]!r} is no digest.")
    return image


def _network(value: object) -> Network:
    if value is None:
        return NO_NETWORK
    fields = _Fields("network", value)
    rate = fields.take("bandwidth_bits", None)
    most = network.MAX_BITS
    found = Network(
        mode=NetworkMode(fields.choice("mode", tuple(mode.value for mode in NetworkMode))),
        allow=fields.texts("allow"),
        bandwidth_bits=None if rate is None else _whole("network.bandwidth_bits", rate, most),
    )
    fields.end()
    try:
        return network.check(found)
    except NetworkInvalid as exc:
        raise InvalidRequest(f"network: {exc.text}") from exc


def sandbox(value: object) -> Sandbox:
    """A policy as the server merged it: values, of which none is believed."""
    if value is None:
        return NO_SANDBOX
    fields = _Fields("sandbox", value)
    found = Sandbox(
        rules=_all(fields, "rules", _rule),
        files=_all(fields, "files", _file_rule),
        writes=_all(fields, "writes", _write_rule),
        nets=_all(fields, "nets", _net_rule),
        counts=_all(fields, "counts", _count_rule),
        answers=_all(fields, "answers", _answer_rule),
        watches=_all(fields, "watches", _watch_rule),
        names=_all(fields, "names", _resolved),
        widen=fields.texts("widen"),
        accepts=fields.texts("accepts"),
        label=fields.text("label", policy.MAX_WORDS, ""),
        broken=fields.text("broken", policy.MAX_WORDS, ""),
    )
    fields.end()
    if len(found.rules) + len(found.writes) + len(found.live) > policy.MAX_RULES:
        raise InvalidRequest(f"sandbox: has more than {policy.MAX_RULES} rules.")
    for name in found.accepts:
        _one("sandbox.accepts", name, policy.UNENFORCED)
    for name in found.widen:
        if name not in policy_base.NAMES or name in policy_base.FIXED:
            raise InvalidRequest(f"sandbox.widen: {name[:60]!r} is no rule that can be widened.")
    return found or NO_SANDBOX


def _all(fields: _Fields, key: str, check: Callable[[object], T]) -> tuple[T, ...]:
    rules = fields.take(key, ())
    if not isinstance(rules, list | tuple) or len(rules) > policy.MAX_RULES:
        raise InvalidRequest(f"sandbox.{key}: must be a list of at most {policy.MAX_RULES}.")
    return tuple(check(rule) for rule in rules)


def _placed(fields: _Fields) -> dict[str, Any]:
    """What all rules have."""
    return {
        "layer": _one("rule.layer", fields.take("layer"), policy.LAYERS[1:]),
        "line": _whole("rule.line", fields.take("line"), policy.MAX_TEXT_BYTES),
        "answer": Answer(_one("rule.answer", fields.take("answer"), tuple(Answer))),
        "code": _whole("rule.code", fields.take("code"), policy.MAX_ERRNO, 1),
        "name": fields.text("name", policy.MAX_WORDS, ""),
        "why": fields.text("why", policy.MAX_WORDS, ""),
    }


def _rule(value: object) -> Rule:
    fields = _Fields("rule", value)
    rule = Rule(
        calls=fields.texts("calls"),
        others=fields.flag("others"),
        check=_check(fields.take("check", None)),
        when=_when(fields.take("when", None)),
        **_placed(fields),
    )
    fields.end()
    try:
        return policy_base.check_rule(rule)
    except PolicyInvalid as exc:
        raise InvalidRequest(f"rule.calls: {exc.text}") from exc


def _file_rule(value: object) -> FileRule:
    fields = _Fields("file rule", value)
    access = fields.texts("access")
    for each in access:
        _one("rule.access", each, tuple(Access))
    rule = FileRule(
        patterns=fields.texts("patterns"),
        others=fields.flag("others"),
        access=tuple(map(Access, access)),
        **_placed(fields),
    )
    return _live(fields, rule)


def _write_rule(value: object) -> WriteRule:
    fields = _Fields("write rule", value)
    return _live(fields, WriteRule(folders=fields.texts("folders"), **_placed(fields)))


def _net_rule(value: object) -> NetRule:
    fields = _Fields("net rule", value)
    rule = NetRule(
        act=Act(_one("rule.act", fields.take("act"), tuple(Act))),
        targets=fields.texts("targets"),
        others=fields.flag("others"),
        **_placed(fields),
    )
    return _live(fields, rule)


def _resolved(value: object) -> Resolved:
    fields = _Fields("name", value)
    found = Resolved(name=fields.text("name", 253, ""), addresses=fields.texts("addresses"))
    return _live(fields, found)


def _count_rule(value: object) -> CountRule:
    fields = _Fields("count rule", value)
    per_s = fields.take("per_s", None)
    rule = CountRule(
        calls=fields.texts("calls"),
        limit=_whole("rule.limit", fields.take("limit"), policy_live.MAX_LIMIT, 1),
        per_s=None if per_s is None else _seconds("rule.per_s", per_s),
        of=fields.text("of", 20, ""),
        **_placed(fields),
    )
    return _live(fields, rule)


def _answer_rule(value: object) -> AnswerRule:
    fields = _Fields("answer rule", value)
    cpus, mem = fields.take("cpus", None), fields.take("mem_bytes", None)
    most_cpus, most_mem = policy_live.MAX_CPUS, policy_live.MAX_MEM_BYTES
    rule = AnswerRule(
        call=fields.text("call", 40, ""),
        nodename=fields.text("nodename", policy.MAX_WORDS, ""),
        release=fields.text("release", policy.MAX_WORDS, ""),
        version=fields.text("version", policy.MAX_WORDS, ""),
        cpus=None if cpus is None else _whole("rule.cpus", cpus, most_cpus, 1),
        mem_bytes=None if mem is None else _whole("rule.mem_bytes", mem, most_mem, 1),
        **_placed(fields),
    )
    return _live(fields, rule)


def _watch_rule(value: object) -> WatchRule:
    fields = _Fields("watch rule", value)
    return _live(fields, WatchRule(**_placed(fields)))


_L = TypeVar("_L", FileRule, WriteRule, NetRule, CountRule, AnswerRule, WatchRule, Resolved)


def _live(fields: _Fields, rule: _L) -> _L:
    fields.end()
    try:
        if isinstance(rule, Resolved):
            policy_live.check_resolved(rule)
        else:
            policy_live.check_live(rule)
    except PolicyInvalid as exc:
        raise InvalidRequest(f"{fields.name}: {exc.text}") from exc
    return rule


def _check(value: object) -> Check | None:
    if value is None:
        return None
    fields = _Fields("check", value)
    check = Check(
        argument=_argument(fields),
        test=Look(_one("check.test", fields.take("test"), tuple(Look))),
        values=_values(fields),
        wide=fields.flag("wide"),
    )
    fields.end()
    if check.test is Look.DENY_BITS and len(check.values) != 1:
        raise InvalidRequest("check.values: deny_bits takes one.")
    return check


def _when(value: object) -> When | None:
    if value is None:
        return None
    fields = _Fields("when", value)
    when = When(argument=_argument(fields), values=_values(fields))
    fields.end()
    return when


def _argument(fields: _Fields) -> int:
    return _whole(f"{fields.name}.argument", fields.take("argument"), 5)


def _values(fields: _Fields) -> tuple[int, ...]:
    name, found = f"{fields.name}.values", fields.take("values")
    if not isinstance(found, list | tuple) or not 1 <= len(found) <= policy.MAX_VALUES:
        raise InvalidRequest(f"{name}: must be a list of 1 to {policy.MAX_VALUES} numbers.")
    return tuple(_whole(name, item, policy.WORD) for item in found)


def _whole(name: str, value: object, most: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidRequest(f"{name}: must be a whole number from {least} to {most}.")
    return value


def _seconds(name: str, value: object) -> float:
    """Of a rate."""
    least, most = policy_live.MIN_PER_S, policy_live.MAX_PER_S
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InvalidRequest(f"{name}: must be a number from {least} to {most}.")
    return value


def _one(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise InvalidRequest(f"{name}: must be one of {', '.join(allowed)}.")
    return value


def _size(value: object) -> Size:
    fields = _Fields("size", value)
    time_s = fields.take("time_s", None)
    size = Size(
        cpu=_finite("size.cpu", fields.take("cpu")),
        mem_bytes=int(_finite("size.mem_bytes", fields.take("mem_bytes"))),
        pids=int(_finite("size.pids", fields.take("pids"))),
        disk_bytes=int(_finite("size.disk_bytes", fields.take("disk_bytes"))),
        time_s=None if time_s is None else _finite("size.time_s", time_s),
    )
    fields.end()
    try:
        return check_size(size)
    except SizeInvalid as exc:
        raise InvalidRequest(f"size.{exc.text}") from exc


def _check_arguments(
    argv: tuple[str, ...], encoding: str, *environments: Mapping[str, str]
) -> None:
    texts = [*argv]
    for environment in environments:
        for key, value in environment.items():
            if not key or "=" in key:
                raise InvalidRequest(f"env: {key[:60]!r} can't be a variable's name.")
            texts += (key, value)
    if any("\0" in text for text in texts):
        raise InvalidRequest("argv and env: a NUL byte can't be in an argument or a variable.")
    try:
        argv_bytes(argv, encoding)
        total = sum(len(text.encode()) for text in texts)
    except UnicodeEncodeError as exc:
        raise InvalidRequest(f"argv and env: can't be encoded as {encoding}.") from exc
    if total > MAX_ARGUMENTS_BYTES:
        raise InvalidRequest(
            f"argv and env: {total} bytes; the most is {MAX_ARGUMENTS_BYTES}. Use a file."
        )


def _finite(name: str, value: object, low: float = 0, high: float = 1e18) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name}: must be a number.")
    if not low <= value <= high or not math.isfinite(value):
        raise InvalidRequest(f"{name}: must lie between {low:g} and {high:g}.")
    return value


class _Fields:
    """Takes fields out of a JSON object; what is left at the end is unknown, thus an error."""

    def __init__(self, name: str, value: object) -> None:
        if not isinstance(value, dict):
            raise InvalidRequest(f"{name}: must be an object.")
        self.name = name
        self.left = dict(value)

    def take(self, key: str, *default: object) -> Any:
        if key in self.left:
            return self.left.pop(key)
        if default:
            return default[0]
        raise InvalidRequest(f"{self.name}.{key}: is missing.")

    def end(self) -> None:
        if self.left:
            raise InvalidRequest(f"{self.name}.{str(min(self.left))[:60]}: unknown field.")

    def flag(self, key: str) -> bool:
        return self._typed(key, bool, False)

    def text(self, key: str, most: int, default: str) -> str:
        found = self._typed(key, str, default)
        if len(found) > most:
            raise InvalidRequest(f"{self.name}.{key}: longer than {most} characters.")
        return found

    def optional_text(self, key: str) -> str | None:
        return (
            None
            if self.left.get(key) is None and self.take(key, None) is None
            else (self.text(key, 200, ""))
        )

    def pattern(self, key: str, pattern: re.Pattern[str], default: str) -> str:
        found = self.text(key, 4096, default)
        if not pattern.fullmatch(found):
            raise InvalidRequest(f"{self.name}.{key}: {found[:60]!r} is not allowed.")
        return found

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        found = self.text(key, 64, allowed[0])
        if found not in allowed:
            raise InvalidRequest(f"{self.name}.{key}: must be one of {', '.join(allowed)}.")
        return found

    def number(self, key: str, low: float, high: float, default: float) -> float:
        return _finite(f"{self.name}.{key}", self.take(key, default), low, high)

    def texts(self, key: str) -> tuple[str, ...]:
        found = self.take(key, ())
        if not isinstance(found, list | tuple) or not all(isinstance(t, str) for t in found):
            raise InvalidRequest(f"{self.name}.{key}: must be a list of texts.")
        return tuple(found)

    def environment(self, key: str) -> dict[str, str]:
        found: dict[str, str] = self._typed(key, dict, {})
        if not all(isinstance(value, str) for value in found.values()):
            raise InvalidRequest(f"{self.name}.{key}: every value must be a text.")
        return found

    def _typed(self, key: str, kind: Callable[..., T], default: T) -> T:
        found = self.take(key, default)
        if not isinstance(found, type(default)):
            raise InvalidRequest(f"{self.name}.{key}: must be {type(default).__name__}.")
        return found
