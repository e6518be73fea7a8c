"""A program and its judge, in two processes: tests ask for values, the program answers, the judge compares.

Where every test is `assert f(literals) == literal`, the program gets the calls as a list and writes down what they
return; the comparison is made where the tests came from (`literal_calls`, `answer_list`, `mark`). Any other test is run
by a judge in a process of its own, with stand-ins for the program's functions: a stand-in sends the arguments to the
program and gets back plain data, numbers, text, containers (`answer_calls`, `judge`).

Either way the program never holds a test, an expected value or a verdict, and nothing it defines (an `__eq__`, an
`assert`, a patched builtin) runs where the comparison is made. What it says, however it came to say it, is right or
wrong; to be right on inputs it has not seen it must do the work.

Objects that are not plain data stay with the program; the judge holds a `Remote`, which has attributes and can be
called, but is equal to nothing and neither true nor false. Main failure mode: an honest program whose results cannot
be sent (an own class compared by `==`) fails; the reason says so.

Only the standard library is imported: see worker.py.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import sys
import types
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

MESSAGE_BYTES = 4 << 20
"""Longest message; a program cannot make its judge hold more."""
_ITEMS = 100_000
"""Most items taken from an iterator."""


class EndOfChannel(Exception):
    """The other side has gone, or talks nonsense."""


def send(channel: int, message: Any) -> None:
    """Write one message to a file descriptor."""
    text = json.dumps(message).encode("ascii")
    data = len(text).to_bytes(4, "big") + text
    try:
        while data:
            data = data[os.write(channel, data) :]
    except OSError as error:
        raise EndOfChannel("the other side has gone") from error


def receive(channel: int) -> Any:
    """Read one message.

    Raises:
        EndOfChannel: there is none, or it is too long or no JSON.
    """
    size = int.from_bytes(_read(channel, 4), "big")
    if size > MESSAGE_BYTES:
        raise EndOfChannel(f"a result of {size} bytes is too long")
    try:
        return json.loads(_read(channel, size))
    except (ValueError, RecursionError) as error:
        raise EndOfChannel("a result that cannot be read") from error


def _read(channel: int, size: int) -> bytes:
    parts = []
    while size:
        try:
            part = os.read(channel, min(size, 1 << 16))
        except OSError as error:
            raise EndOfChannel("the other side has gone") from error
        if not part:
            raise EndOfChannel("the program ended before it had answered")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# --- values as JSON --------------------------------------------------------------------------------------------------
# Numbers, strings, lists, True, False and None are themselves; everything else is {"t": type, "v": content}.

_CONTAINERS = (tuple, set, frozenset)
_WRITTEN: tuple[type, ...] = (complex, Decimal)
_MADE_OF: dict[type, Callable[[Any], tuple[int, ...]]] = {
    range: lambda r: (r.start, r.stop, r.step),
    Fraction: lambda f: (f.numerator, f.denominator),
    datetime: lambda d: (*d.timetuple()[:6], d.microsecond),
    date: lambda d: d.timetuple()[:3],
    time: lambda t: (t.hour, t.minute, t.second, t.microsecond),
    timedelta: lambda d: (d.days, d.seconds, d.microseconds),
}
_TYPES: dict[str, type] = {kind.__name__: kind for kind in (*_WRITTEN, *_MADE_OF, *_CONTAINERS)}


def encode(value: Any, remote: Callable[[Any], Any]) -> Any:
    """Return `value` as JSON data; subclasses of plain types are sent as those, `remote` sees what is no data."""
    if value is None or isinstance(value, (bool, float)):
        return value if value is None or isinstance(value, bool) else float(value)
    if isinstance(value, int):
        whole = int(value)
        return whole if whole.bit_length() < 8192 else {"t": "hex", "v": hex(whole)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return {"t": type(value).__name__, "v": value.hex()}
    if isinstance(value, list):
        return [encode(item, remote) for item in value]
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode(k, remote), encode(v, remote)] for k, v in value.items()]}
    for kind in _CONTAINERS:
        if isinstance(value, kind):
            return {"t": kind.__name__, "v": [encode(item, remote) for item in value]}
    if type(value) in _WRITTEN:
        return {"t": type(value).__name__, "v": str(value)}
    if type(value) in _MADE_OF and getattr(value, "tzinfo", None) is None:
        return {"t": type(value).__name__, "v": list(_MADE_OF[type(value)](value))}
    return remote(value)


def decode(data: Any, remote: Callable[[dict[str, Any]], Any]) -> Any:
    """Return the value that `encode` wrote."""
    if isinstance(data, list):
        return [decode(item, remote) for item in data]
    if not isinstance(data, dict):
        return data
    kind, content = data["t"], data["v"]
    if kind == "hex":
        return int(content, 16)
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray).fromhex(content)
    if kind == "dict":
        return {decode(key, remote): decode(value, remote) for key, value in content}
    if kind == "remote":
        return remote(data)
    if kind in _TYPES and isinstance(content, list):
        parts = [decode(item, remote) for item in content]
        plain = _TYPES[kind]
        return plain(*parts) if plain in _MADE_OF else plain(parts)
    return _TYPES[kind](content)


# --- the program's side ----------------------------------------------------------------------------------------------


def run_program(source: str, module: types.ModuleType) -> None:
    """Run the source as `module`."""
    sys.modules[module.__name__] = module
    exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)


class _Kept(list[Any]):
    """The program's objects that are no plain data, by their number; number 0 is the program itself."""

    def encode(self, value: Any) -> Any:
        return encode(value, self._keep)

    def decode(self, data: Any) -> Any:
        return decode(data, lambda remote: self[remote["v"]])

    def _keep(self, value: Any) -> dict[str, Any]:
        self.append(value)
        base = next((b.__name__ for b in _lineage(value) if b.__module__ == "builtins"), "Exception")
        is_error = isinstance(value, type) and issubclass(value, Exception)
        name = value.__name__ if isinstance(value, type) else type(value).__name__
        return {"t": "remote", "v": len(self) - 1, "name": name, "error": base if is_error else None}

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for."""
        try:
            arguments = [self.decode(value) for value in request["arguments"]]
            named = {name: self.decode(value) for name, value in request["named"].items()}
            return {"value": self.encode(_do(request["action"], self[request["object"]], arguments, named))}
        except BaseException as error:
            return _raised(error)


def _start(source: str) -> tuple[_Kept, dict[str, Any]]:
    """Run a program; return it, and how that went."""
    module = types.ModuleType("program")
    try:
        run_program(source, module)
    except BaseException as error:
        return _Kept([module]), _raised(error)
    return _Kept([module]), {"value": None}


def answer_list(source: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run a program, then every call; return how the program went and what each call returned or raised."""
    kept, started = _start(source)
    return [started] if "raised" in started else [started, *map(kept.reply, calls)]


def answer_calls(source: str, channel: int) -> None:
    """Run a program, then do what the judge asks of it until the judge has gone."""
    kept, reply = _start(source)
    while True:
        with contextlib.suppress(Exception):  # what it printed is for the log, and is lost once it is killed
            sys.stdout.flush()
        send(channel, reply)
        reply = kept.reply(receive(channel))


def _lineage(value: Any) -> tuple[type, ...]:
    return value.__mro__ if isinstance(value, type) else type(value).__mro__


def _do(action: str, target: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
    if action == "call":
        return target(*arguments, **named)
    if action == "function":
        return getattr(target, arguments[0])(*arguments[1:], **named)
    if action == "get":
        return getattr(target, arguments[0])
    if action == "set":
        return setattr(target, arguments[0], arguments[1])
    if action == "item":
        return target[arguments[0]]
    if action == "length":
        return len(target)
    if action == "text":
        return str(target)
    return list(islice(iter(target), _ITEMS))


def _raised(error: BaseException) -> dict[str, Any]:
    return {
        "raised": [kind.__name__ for kind in type(error).__mro__],
        "text": f"{error}"[:300] if isinstance(error, Exception) else "",
    }


# --- tests that are a list of calls ----------------------------------------------------------------------------------


def literal_calls(tests: Sequence[str]) -> tuple[list[dict[str, Any]], list[Any]] | None:
    """Return (calls as requests, expected values) if every test is `assert f(literals) == literal`, else None."""
    calls, expected = [], []
    try:
        for statement in ast.parse("\n".join(tests)).body:
            match statement:
                case ast.Assert(
                    test=ast.Compare(
                        left=ast.Call(func=ast.Name(id=name), args=positional, keywords=keywords),
                        ops=[ast.Eq()],
                        comparators=[right],
                    )
                ) if not hasattr(builtins, name):
                    arguments = [name, *map(ast.literal_eval, positional)]
                    named = {
                        str(word.arg): encode(ast.literal_eval(word.value), _as_remote) for word in keywords
                    }
                    request = {"action": "function", "object": 0, "named": named}
                    calls.append(request | {"arguments": [encode(a, _as_remote) for a in arguments]})
                    expected.append(ast.literal_eval(right))
                case _:
                    return None
    except (SyntaxError, ValueError, TypeError, RecursionError):
        return None
    return (calls, expected) if calls else None


def mark(answers: bytes, expected: Sequence[Any]) -> dict[str, Any]:
    """Compare what a program wrote down with what was expected; return status, detail and calls answered."""
    try:
        replies = json.loads(answers)
        started, *results = replies
        if "raised" in started:
            return {"status": "error", "detail": _described(started), "calls": 0}
        for number, (reply, wanted) in enumerate(zip(results, expected, strict=True)):
            if "raised" in reply:
                status = "memory" if reply["raised"][0] == "MemoryError" else "failed"
                return {"status": status, "detail": _described(reply), "calls": number + 1}
            value = decode(reply["value"], lambda remote: NotImplemented)
            if value is NotImplemented or value != wanted:
                detail = f"test {number + 1}: {value!r:.200} in place of {wanted!r:.200}"
                return {"status": "failed", "detail": detail, "calls": number + 1}
    except Exception:
        # Whatever is wrong with the answers, the program wrote them.
        return {"status": "failed", "detail": "the program ended before it had answered", "calls": 0}
    return {"status": "passed", "detail": "", "calls": len(expected)}


def _described(reply: Mapping[str, Any]) -> str:
    return f"{reply['raised'][0]}: {reply.get('text', '')}"[:500]


# --- the judge's side ------------------------------------------------------------------------------------------------


class Program:
    """The judge's end of the channel: turns calls into messages and answers into values."""

    def __init__(self, channel: int) -> None:
        self._channel = channel
        self._errors: dict[str, type[Exception]] = {}
        self.calls = 0
        self._value(receive(channel))  # once the program has run

    def name(self, name: str) -> Any:
        """Return what the program defines as `name`.

        Raises:
            NameError: nothing.
        """
        try:
            return self.attribute(name)
        except AttributeError as error:
            raise NameError(f"the program defines no {name}") from error

    def attribute(self, name: str) -> Any:
        """Return what a module of the program's would have as `name`.

        Raises:
            AttributeError: nothing, or a name of the import system, which is none of the program's business.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        return self.ask("get", 0, (name,), {})

    def ask(self, action: str, key: int, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Have the program do something with one of its objects.

        Raises:
            Exception: what the program raised, as the builtin exception it is or descends from.
        """
        self.calls += action == "call"
        sent = [encode(argument, _as_remote) for argument in arguments]
        request = {"action": action, "object": key, "arguments": sent}
        request["named"] = {name: encode(value, _as_remote) for name, value in named.items()}
        send(self._channel, request)
        return self._value(receive(self._channel))

    def _value(self, reply: Any) -> Any:
        if not isinstance(reply, dict):
            raise EndOfChannel("a result that cannot be read")
        if "raised" in reply:
            raise self._error([str(name) for name in reply["raised"]], str(reply.get("text", "")))
        try:
            return decode(reply.get("value"), self._remote)
        except Exception as error:
            raise EndOfChannel("a result that cannot be read") from error

    def _remote(self, data: dict[str, Any]) -> Any:
        name = str(data["name"])
        if data["error"] is None:
            return Remote(self, int(data["v"]), name)
        if name not in self._errors:
            self._errors[name] = type(name, (_builtin_error(str(data["error"])) or Exception,), {})
        return self._errors[name]

    def _error(self, lineage: list[str], text: str) -> Exception:
        for name in lineage:
            kind = self._errors.get(name) or _builtin_error(name)
            if kind is not None:
                with contextlib.suppress(TypeError):  # UnicodeError wants more than a text
                    return kind(text)
        return RuntimeError(f"{lineage[0] if lineage else 'error'}: {text}")


def _builtin_error(name: str) -> type[Exception] | None:
    """Return a builtin exception, but none that would steer the judge (AssertionError is a failed test anyway)."""
    kind = getattr(builtins, name, None)
    steers = ("StopIteration", "StopAsyncIteration")
    is_error = isinstance(kind, type) and issubclass(kind, Exception) and name not in steers
    return kind if is_error else None


def _as_remote(value: Any) -> dict[str, Any]:
    if isinstance(value, Remote):
        return {"t": "remote", "v": object.__getattribute__(value, "_key")}
    raise TypeError(f"a {type(value).__name__} cannot be given to the program")


class Remote:
    """An object that lives with the program. Equal to nothing; whether it is true cannot be asked."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, program: Program, key: int, name: str) -> None:
        for slot, value in (("_program", program), ("_key", key), ("_name", name)):
            object.__setattr__(self, slot, value)

    def _ask(self, action: str, *arguments: Any, **named: Any) -> Any:
        return self._program.ask(action, self._key, arguments, named)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __len__(self) -> int:
        return int(self._ask("length"))

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._ask("items")))

    def __str__(self) -> str:
        return str(self._ask("text"))

    def __repr__(self) -> str:
        return f"<the program's {self._name}>"

    def _refuse(self, *_: object) -> bool:
        raise TypeError(f"the program's result is a {self._name}, which cannot be compared with plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse  # type: ignore[assignment]


def names_used(tests: str) -> tuple[set[str], set[str]]:
    """Return the names that tests use and neither define nor import: those of the program, and modules.

    Builtins and modules of the standard library are never taken from the program, or it could bring its own `abs` or
    `math` to its trial; only the entry point may have such a name.
    """
    used: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    free, modules = used - bound - set(dir(builtins)), set(sys.stdlib_module_names)
    return free - modules, free & modules


def judge(exam: Mapping[str, Any], channel: int) -> dict[str, Any]:
    """Run the tests against the program at the other end of `channel`; return status, detail and calls made."""
    program: Program | None = None
    try:
        program = Program(channel)
        _run_tests(exam, program)
        if not program.calls:
            return _verdict("failed", "the tests never called the program", program)
        return _verdict("passed", "", program)
    except EndOfChannel as error:
        return _verdict("failed", str(error), program)
    except AssertionError as error:
        return _verdict("failed", f"assertion failed {error}".strip(), program)
    except MemoryError:
        return _verdict("memory", "out of memory", program)
    except BaseException as error:
        status = "error" if program is None else "failed"
        return _verdict(status, f"{type(error).__name__}: {error}", program)


def _verdict(status: str, detail: str, program: Program | None) -> dict[str, Any]:
    return {"status": status, "detail": detail[:500], "calls": program.calls if program else 0}


def _run_tests(exam: Mapping[str, Any], program: Program) -> None:
    entry_point, tests = exam["entry_point"], "\n\n".join(exam["tests"])
    if exam["module"]:
        stand_in = types.ModuleType(exam["module"])
        stand_in.__getattr__ = program.attribute  # type: ignore[method-assign]
        sys.modules[exam["module"]] = stand_in
    borrowed, modules = names_used(tests)
    scope: dict[str, Any] = {"__name__": "tests"}
    for name in modules - {entry_point}:  # MBPP's tests use math without importing it
        with contextlib.suppress(ImportError):
            scope[name] = importlib.import_module(name)
    for name in borrowed - {"candidate", entry_point}:
        with contextlib.suppress(NameError):  # the test that needs it will say so
            scope[name] = program.name(name)
    if entry_point:
        scope[entry_point] = scope["candidate"] = program.name(entry_point)
    # Assertions must hold however Python was started, so no optimisation.
    exec(compile(tests, "<tests>", "exec", optimize=0), scope)
    if entry_point and callable(scope.get("check")):  # HumanEval's form
        scope["check"](scope["candidate"])
    for name, function in list(scope.items()):
        if name.startswith("test_") and isinstance(function, types.FunctionType):
            function()
    _run_unittests(scope)


def _run_unittests(scope: Mapping[str, Any]) -> None:
    cases = [
        value for value in scope.values() if isinstance(value, type) and issubclass(value, unittest.TestCase)
    ]
    suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, cases))
    result = unittest.TestResult()
    suite.run(result)
    wrong = result.failures + result.errors
    if wrong or result.skipped:
        test, reason = (wrong or result.skipped)[0]
        raise AssertionError(f"in {test}: {reason.strip().splitlines()[-1] if reason else ''}")
