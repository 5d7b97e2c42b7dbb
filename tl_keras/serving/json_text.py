"""Reads large JSON documents in parts: unused members are only checked, large values are parsed in slices.

Python's JSON parser holds the global interpreter lock and creates an object for each value. For `[{},{},…]` the objects
take 24 times the size of the text. The parser therefore gets at most one slice, or a value whose parts were counted.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tl_keras.serving.errors import RequestError, invalid

SLICE_BYTES = 1 << 18  # parsing a slice takes a few milliseconds
MOST_VALUES, VALUES_PER_IMAGE = 1 << 16, 16  # limit for a value that is larger than a slice and parsed as a whole
_MOST_SKIPPED = 1 << 21  # limit of brackets, commas and colons in an unused member
_MOST_MEMBERS = 1024
_MOST_LEVELS = 200  # Python's limit of recursion is 1000
_OPEN, _CLOSE, _COMMA, _COLON, _QUOTE, _BACKSLASH = 1, 2, 3, 4, 5, 6
_SPECIAL = {**dict.fromkeys(b"[{", _OPEN), **dict.fromkeys(b"]}", _CLOSE), 0x2C: _COMMA, 0x3A: _COLON}
_SPECIAL |= {0x22: _QUOTE, 0x5C: _BACKSLASH}
_KINDS = bytes(_SPECIAL.get(character, 0) for character in range(256))  # a table for `bytes.translate`
_STEPS = np.array([0, 1, -1, 0, 0], np.int8)
_SPACE = b" \t\r\n"
_BLANK = re.compile(rb"[ \t\r\n]*")
_NAMES_OF_NUMBERS = re.compile(rb'"(?:[^"\\]|\\.)*"|-?(?:Infinity|Inf|NaN)', re.DOTALL)
_TOKEN = re.compile(
    rb'[ \t\r\n]*(?:([\[\]{},:])|("[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*")'
    rb"|(-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|-?(?:Infinity|Inf|NaN)))",
    re.DOTALL,
)
_REASONS = {  # Python's messages → rapidjson's (error/en.h), which TF Serving returns
    "Expecting property name": "Missing a name for object member.",
    "Illegal trailing comma": "Invalid value.",
    "Expecting ':'": "Missing a colon after a name of object member.",
    "Expecting ','": "Missing a comma or ] or } after a value.",
    "Extra data": "Missing a comma or ] or } after a value.",
    "Unterminated string": "Missing a closing quotation mark in string.",
    "Invalid control character": "Invalid encoding in string.",
    "Invalid \\escape": "Invalid escape character in string.",
    "Invalid \\uXXXX": "Incorrect hex digit after \\u escape in string.",
}


TOO_BIG = "Number too big to be stored in double."


class Text:
    """A JSON value in a request's body that is not parsed yet."""

    __slots__ = ("body", "end", "start")

    def __init__(self, body: bytes, start: int, end: int) -> None:
        """Args: body: the request's body; start, end: position of the value, with surrounding white space."""
        match = _BLANK.match(body, start, end)
        self.body, self.start, self.end = body, match.end() if match else start, end

    @property
    def first(self) -> bytes:
        """The first character, which tells the kind of the value."""
        return self.body[self.start : self.start + 1] if self.start < self.end else b""

    @property
    def is_small(self) -> bool:
        """Whether the value fits into one slice."""
        return self.end - self.start <= SLICE_BYTES

    def load(self, *, most: int = MOST_VALUES, last_wins: bool = False) -> Any:
        """Parses the value. If a key is repeated, its first value counts.

        Args:
            most: maximum number of brackets, commas and colons, if the text is larger than a slice.
            last_wins: the last value of a repeated key counts instead.

        Raises:
            RequestError: the text is not JSON, is nested too deeply, or holds too many values.
        """
        if not self.is_small and self._count(most) is None:
            raise invalid(f"the JSON value at offset {self.start} holds more than {most} values")
        if self._is_deep():
            self._check_tokens()
            raise invalid(f"Encountered list at unexpected level: the JSON at offset {self.start} is nested too deeply")
        try:
            return _parse(self.body[self.start : self.end], last_wins=last_wins)
        except _BadTextError as error:
            raise fail(error.reason, self.start + error.offset) from None

    def check(self) -> None:
        """Checks the syntax of an unused value.

        Raises:
            RequestError: the text is not JSON.
        """
        if not self.is_small and self._count(_MOST_SKIPPED) is None:
            raise invalid(f"the JSON value at offset {self.start} holds more than {_MOST_SKIPPED} brackets and commas")
        if self._is_deep() or (not self.is_small and self._count(MOST_VALUES) is None):
            self._check_tokens()
            return
        try:
            _parse(self.body[self.start : self.end])
        except _BadTextError as error:
            raise fail(error.reason, self.start + error.offset) from None

    def members(self, *, is_document: bool = False) -> dict[str, Text]:
        """Splits an object into its members. If a key is repeated, its first value counts and the others are checked.

        Args:
            is_document: text after the object is ignored.

        Raises:
            RequestError: the text is not an object, or has too many members.
        """
        found, keys, after_key = dict[str, Text](), 0, False
        start = self.start + 1
        for position, kind in self._cut(b"}", is_document=is_document):
            if not after_key:
                if kind == _CLOSE and not keys and self._is_blank(start, position):
                    return {}
                if kind != _COLON:
                    reason = "Missing a name for object member." if self._is_blank(start, position) else ""
                    raise fail(reason or "Missing a colon after a name of object member.", position)
                key = self._load_key(start, position)
                keys += 1
                if keys > _MOST_MEMBERS:
                    raise invalid(f"a JSON object holds more than {_MOST_MEMBERS} members")
            elif kind == _COLON:
                raise fail("Missing a comma or } after an object member.", position)
            else:
                value = Text(self.body, start, position)
                if found.setdefault(key, value) is not value:
                    value.check()
            after_key, start = kind == _COLON, position + 1
        return found

    def items(self, most: int, message: Callable[[int], RequestError]) -> list[Text]:
        """Splits a list into its items.

        Args:
            most: maximum number of items.
            message: creates the error for a longer list.

        Raises:
            RequestError: the text is not a list, or is too long.
        """
        found, start = list[Text](), self.start + 1
        for position, kind in self._cut(b"]"):
            if kind == _CLOSE and not found and self._is_blank(start, position):
                return []
            if kind == _COLON:
                raise fail("Missing a comma or ] after an array element.", position)
            found.append(Text(self.body, start, position))
            if len(found) > most:
                raise message(len(found))
            start = position + 1
        return found

    def groups(self) -> Iterator[Text]:
        """Splits a list into groups of items: several items that fit into a slice, or one of any size.

        Raises:
            RequestError: the text is not a list.
        """
        start = self.start + 1
        for found, kinds, depths in self._scan():
            ends = np.flatnonzero(depths == 0)
            stop = int(ends[0]) if len(ends) else len(found)
            commas = found[:stop][(depths[:stop] == 1) & (kinds[:stop] == _COMMA)]
            # the text between the last comma of a block and the first one of a later block is a single item
            for position in sorted({int(commas[0]), int(commas[-1])}) if len(commas) else ():
                yield Text(self.body, start, position)
                start = position + 1
            if len(ends):
                self._check_end(int(found[stop]), b"]", is_document=False)
                yield Text(self.body, start, int(found[stop]))
                return
        raise self._unfinished()

    def _is_deep(self) -> bool:
        """Whether parsing would recurse deeply. A collection of garbage at the limit of recursion breaks finalizers."""
        opened = self.body.count(b"[", self.start, self.end) + self.body.count(b"{", self.start, self.end)
        return opened > _MOST_LEVELS and not self.is_at_most(_MOST_LEVELS)

    def is_at_most(self, levels: int) -> bool:
        """Whether lists and objects are nested at most `levels` deep."""
        return all(depths.max(initial=0) <= levels for _, _, depths in self._scan())

    def _cut(self, last: bytes, *, is_document: bool = False) -> Iterator[tuple[int, int]]:
        """Finds the commas and colons of a list or object, and its closing bracket: positions and kinds."""
        for found, kinds, depths in self._scan():
            ends = np.flatnonzero(depths == 0)
            stop = int(ends[0]) if len(ends) else len(found)
            here = (depths[:stop] == 1) & (kinds[:stop] >= _COMMA)
            yield from zip(found[:stop][here].tolist(), kinds[:stop][here].tolist(), strict=True)
            if len(ends):
                position = int(found[stop])
                self._check_end(position, last, is_document=is_document)
                yield position, _CLOSE
                return
        raise self._unfinished()

    def _check_end(self, position: int, last: bytes, *, is_document: bool) -> None:
        at_end = is_document or self._is_blank(position + 1, self.end)
        if self.body[position : position + 1] != last or not at_end:
            raise fail(f"Missing a comma or {last.decode()} after a value.", position)

    def _unfinished(self) -> RequestError:
        """Creates the error for a list or object without an end. rapidjson's message depends on the last character."""
        end = self.end
        while end > self.start and self.body[end - 1] in _SPACE:
            end -= 1
        last = self.body[end - 1 : end]
        if last == b"{":
            return fail("Missing a name for object member.", end)
        if last in {b"[", b",", b":"}:
            return fail("Invalid value.", end)
        return fail("Missing a comma or ] or } after a value.", end)

    def _load_key(self, start: int, end: int) -> str:
        key = Text(self.body, start, end)
        if key.first != b'"':
            raise fail("Missing a name for object member.", key.start)
        return str(key.load())

    def _is_blank(self, start: int, end: int) -> bool:
        return _BLANK.fullmatch(self.body, start, end) is not None

    def _count(self, most: int) -> int | None:
        """Counts brackets, commas and colons outside strings; None if there are more than `most`."""
        total = 0
        for found, _, _ in self._scan():
            total += len(found)
            if total > most:
                return None
        return total

    def _scan(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Finds brackets, commas and colons outside strings, block by block: positions, kinds, resulting depths."""
        in_string = escaped = False
        depth = 0
        for start in range(self.start, self.end, SLICE_BYTES):
            end = min(start + SLICE_BYTES, self.end)
            if in_string and not escaped and self.body.find(b'"', start, end) < 0 > self.body.find(b"\\", start, end):
                continue  # the middle of a long string
            special = np.frombuffer(self.body[start:end].translate(_KINDS), np.uint8)
            found = np.flatnonzero(special)
            kinds = special[found]
            quotes, escaped = _find_quotes(found, kinds, end - start, escaped)
            inside = np.cumsum(quotes, dtype=np.int64) + in_string & 1
            in_string = bool(np.count_nonzero(quotes) + in_string & 1)
            is_outside = (kinds <= _COLON) & (inside == 0)
            found, kinds = found[is_outside], kinds[is_outside]
            depths = depth + np.cumsum(_STEPS[kinds], dtype=np.int64)
            if len(depths):
                depth = int(depths[-1])
            yield found + start, kinds, depths

    def _check_tokens(self) -> None:
        """Checks a value token by token, without recursion."""
        stack, expected, position = bytearray(), "value", self.start
        while position < self.end:
            match = _TOKEN.match(self.body, position, self.end)
            if match is None:
                if self._is_blank(position, self.end):
                    break
                raise fail("Invalid value.", position)
            position = match.end()
            expected = _advance(match, expected, stack)
            if expected == "end":
                break
        if expected != "end" or not self._is_blank(position, self.end):
            raise (
                self._unfinished() if expected != "end" else fail("Missing a comma or ] or } after a value.", position)
            )


def fail(reason: str, offset: int) -> RequestError:
    """Creates a parse error with TF Serving's wording."""
    return invalid(f"JSON Parse error: {reason} at offset: {offset}")


class Constant(float):
    """NaN or an infinity that the text names; other infinite numbers are too large for a double, such as 1e400."""


class _BadTextError(Exception):
    """The text is not JSON: rapidjson's reason and the offset."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.reason, self.offset = reason, offset


def _find_quotes(found: np.ndarray, kinds: np.ndarray, length: int, escaped: bool) -> tuple[np.ndarray, bool]:
    """Finds the quotes that begin or end strings.

    Args:
        found: positions of special characters in a block.
        kinds: kinds of these characters.
        length: length of the block.
        escaped: whether the block starts after an escaping backslash.

    Returns:
        Mask of the quotes among the characters, and whether the next block starts after an escaping backslash.
    """
    quotes = kinds == _QUOTE
    backslashes = found[kinds == _BACKSLASH]
    if escaped and len(found) and not found[0]:
        quotes[0] = False
        backslashes = backslashes[backslashes > 0]
    if not len(backslashes):
        return quotes, False
    # in a run of backslashes the first, third, … one escapes the next character
    begins = np.diff(backslashes, prepend=-2) != 1
    offsets = backslashes - np.maximum.accumulate(np.where(begins, backslashes, 0))
    escapes = backslashes[offsets % 2 == 0] + 1
    return quotes & ~np.isin(found, escapes), bool(escapes[-1] == length)


def _advance(match: re.Match[bytes], expected: str, stack: bytearray) -> str:
    """Returns what is expected after a token.

    Raises:
        RequestError: the token is unexpected.
    """
    token, is_string = match.group(1), match.group(2) is not None
    opened = stack[-1:] if stack else b""
    after_value = "more" if stack else "end"
    if token is None:
        if expected in {"key", "key or }"} and is_string:
            return ":"
        if expected in {"value", "value or ]"}:
            return after_value
    elif token in b"[{" and expected in {"value", "value or ]"}:
        stack += token
        return "value or ]" if token == b"[" else "key or }"
    elif token in b"]}" and expected in {"more", "value or ]" if token == b"]" else "key or }"}:
        if opened == (b"[" if token == b"]" else b"{"):
            stack.pop()
            return "more" if stack else "end"
    elif token == b":" == expected.encode():
        return "value"
    elif token == b"," and expected == "more":
        return "value" if opened == b"[" else "key"
    raise fail(
        "Invalid value." if expected.startswith("value") else "Missing a comma or ] or } after a value.", match.end()
    )


def _parse(text: bytes, *, last_wins: bool = False) -> Any:
    """Parses JSON, and accepts rapidjson's names for infinity.

    Raises:
        _BadTextError: the text is not JSON.
    """
    decoder = _make_decoder(last_wins)
    try:
        return decoder.decode(text.decode("utf-8"))
    except json.JSONDecodeError as error:
        known = next((ours for theirs, ours in _REASONS.items() if error.msg.startswith(theirs)), "Invalid value.")
        failure = _BadTextError(known, error.pos)
    except UnicodeDecodeError as error:
        failure = _BadTextError("the body is not text in UTF-8.", error.start)
    except ValueError:  # an integer of thousands of digits
        failure = _BadTextError(TOO_BIG, 0)
    if b"Inf" in text or b"-NaN" in text:
        replaced = _NAMES_OF_NUMBERS.sub(_as_python_names_it, text)
        if replaced != text:
            return _parse(replaced, last_wins=last_wins)
    raise failure


def _as_python_names_it(match: re.Match[bytes]) -> bytes:
    found = match.group()
    return {b"Inf": b"Infinity", b"-Inf": b"-Infinity", b"-NaN": b"NaN"}.get(found, found)


@functools.cache
def _make_decoder(last_wins: bool) -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=None if last_wins else _keep_first, parse_constant=Constant)


def _keep_first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        found = dict(reversed(pairs))
    return found
