"""A command line as it was pasted, to words: shell prompts, broken lines, quotes and launchers away."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from moe_core.config import ConfigError
from moe_core.dialects.flags import ANYWHERE, DIALECTS

_END = {"|", "||", "&&", "&", ";", ">", ">>", "2>", "2>&1", "*>", "<"}  # between a shell's commands
_NOT_A_PATH = re.compile(r"(py|python[\d.]*|torchrun|accelerate|deepspeed|uv|srun|nohup|time|env|PS|&)(\.exe)?"
                         r"|\(.*|.*[$#%>❯]|\w+=.*")
_BLANKS = "\u00a0\u2007\u202f\u3000\u200b\ufeff"  # that web pages and word processors put in
_TO_COMMENT = re.compile(r"""(?:[^'"#]|'[^']*'|"[^"]*"|(?<=\S)#)*""")  # up to a # that begins a word
_VALUED = set(ANYWHERE).union(*(d.flags for d in DIALECTS.values()))


class Said(NamedTuple):
    """A flag as ``typed``, its ``key`` (with underscores, without dashes) and the words that follow it."""

    typed: str
    key: str
    words: list[str]


def words(command: str | Sequence[str]) -> list[str]:
    """The words of a line, or of words of which one may be a whole quoted line. Raises ConfigError.

    As a shell would cut it, but that a backslash stands for itself, as it does in Windows paths.
    """
    if isinstance(command, str):
        return _cut(command)
    if not isinstance(command, Sequence):
        raise ConfigError(f"command = {command!r}: must be a command line, or a list of its words")
    given, found = [str(word) for word in command], []
    for before, word in zip(["", *given], given, strict=False):
        whole = " " in word and re.search(r"(^|\s)--", word) and not is_flag(before)
        found += _cut(word) if whole else [word]
    return found


def _cut(line: str) -> list[str]:
    text = re.sub(r"[\\`^][ \t]*(?:\r?\n|$)[ \t]*(?:>{1,2}[ \t])?", " ", line.strip())  # broken lines
    text = re.sub(r"(?<=\s)[\\`^](?=\s)", " ", text)  # the same, joined since
    lexer = shlex.shlex(_uncommented(text), posix=True)
    lexer.whitespace += _BLANKS
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        found = list(lexer)
    except ValueError:
        raise ConfigError(f"command = {line!r}: must have balanced quotes") from None
    return _command(found)


def _uncommented(text: str) -> str:
    """The text without shell comments; a # before any script or flag is the prompt of root."""
    kept, rest = "", text
    while (plain := _TO_COMMENT.match(rest)) and rest[plain.end():].startswith("#"):
        before = kept + plain[0]
        begun = any(is_flag(word) or word.endswith(".py") for word in before.split())
        rest = rest[plain.end() + 1:]
        kept, rest = (before, rest.partition("\n")[2]) if begun else (before + "#", rest)
    return kept + rest


def _command(found: list[str]) -> list[str]:
    """Of several commands on one line (``cd code && python ... | tee log``) the one with a script or flags."""
    parts: list[list[str]] = [[]]
    for word in found:
        ends = word.endswith(";") and not any(map(is_flag, parts[-1]))
        if word not in _END:
            parts[-1].append(word.removesuffix(";") if ends else word)
        if ends or word in _END:
            parts.append([])
    return next((part for part in parts if any(is_flag(word) or word.endswith(".py") for word in part)),
                next(filter(None, parts), []))


def is_flag(word: str) -> bool:
    """Whether a word is a flag, and not a value or a negative number."""
    return re.match(r"(?:--?|[–—])[A-Za-z]", word) is not None  # word processors join two dashes into one


def key(word: str) -> str:
    """A flag's name with underscores, without its dashes and its value."""
    return word.lstrip("-–—").partition("=")[0].replace("-", "_")


def split(line: list[str]) -> tuple[str | None, str | None, list[Said]]:
    """(script, run directory, flags) of a line's words. Raises ConfigError for words that are none of these.

    Before the script may stand a prompt, variables, and a launcher with flags of its own; they are dropped. The
    directory is what stands alone after ``moe train``.
    """
    at = next((i for i, word in enumerate(line) if _is_script(word, line[i - 1] if i else "")), None)
    first = next((i for i, word in enumerate(line) if is_flag(word)), len(line))
    lead, rest = (line[:first], line[first:]) if at is None else (line[:at], line[at + 1:])
    script = None if at is None else PurePosixPath(line[at].replace("\\", "/")).stem + ".py"
    place, ours = None, [i for i, word in enumerate(lead) if word in ("train", "shootout") and i
                         and PurePosixPath(lead[i - 1].replace("\\", "/")).stem in ("moe", "moe_core")]
    if ours:
        lead = lead[ours[0] + 1:]
        if lead and not _NOT_A_PATH.fullmatch(PurePosixPath(lead[0].replace("\\", "/")).name):
            place, *lead = lead
    if lead and (script is not None or _NOT_A_PATH.fullmatch(lead[0]) or _NOT_A_PATH.fullmatch(lead[-1])):
        lead = []
    if stray := [*lead, *(rest[:1] if rest and not is_flag(rest[0]) else [])]:
        raise ConfigError(f"{stray[0]}: was not expected here; a command is a script's name, if any, and its --flags")
    return script, place, list(_said(rest))


def _is_script(word: str, before: str) -> bool:
    name = PurePosixPath(word.replace("\\", "/")).name
    if is_flag(before) and "=" not in before and key(before) in _VALUED:
        return False  # its value
    return name.endswith(".py") or (before == "-m" and f"{name}.py" in DIALECTS)


def _said(line: list[str]) -> Iterator[Said]:
    at = [i for i, word in enumerate(line) if is_flag(word)]
    for start, end in zip(at, [*at[1:], len(line)], strict=False):
        typed, equals, value = line[start].partition("=")
        yield Said(typed, key(typed), [*([value] if equals else []), *line[start + 1:end]])
