"""Strict argument parsers: no abbreviated flags, one-line errors, the nearest name suggested.

jsonargparse reports a wrong key inside nested classes as an indented tree of every alternative it tried.
`explain` reads that tree and keeps the deepest complaint, with the key it is about.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader
from jsonargparse.typing import Path_fr

from certdraft.train.runs.config_files import fill_in_groups, shipped

_KEY = re.compile(r'^Parser key "(?P<key>[^"]+)":')
_CLASS = re.compile(r"^Problem with given class_path '(?P<path>[^']+)'")
_NOISE = re.compile(
    r"^(Does not validate against any|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|"
    r"Problem with|Parser key)"
)
_OPTION = re.compile(
    r"^(?:Option '(?P<a>[^']+)' is not accepted|Subcommand '\w+' does not accept option '(?P<b>[^']+)'|"
    r"unrecognized arguments: --(?P<c>[^\s=]+)|"
    r"Group '(?P<group>[^']+)' does not accept option '(?P<d>[^']+)')"
)
_IMPORT = re.compile(
    r"^(?:Expected a dot import path string: ?|Unexpected import path format: ?|No module named |"
    r"module '[^']+' has no attribute )(?P<name>\S+)"
)
_PATH = re.compile(r"^Expected a path but (?P<name>\S+\.(?:ya?ml|json)) ")

_CONFIG = ("-c", "--config")
_read_yaml = get_loader("yaml")


def _readable(name: str) -> bool:
    """Whether a path leads to a file from the folder of the config that is being read."""
    try:
        Path_fr(name)
    except TypeError:
        return False
    return True


def _read_config(text: str) -> Any:
    """Read YAML; a config that was copied elsewhere finds the group files that ship."""
    return fill_in_groups(_read_yaml(text), _readable)


set_loader("yaml", _read_config, (yaml.YAMLError,))


class Strict:
    """Mixin of argument parsers: exact flags only, and `error` in one paragraph with exit code 2.

    Attributes:
        typed: the arguments of this process' command; set by `check_syntax`.
    """

    prog: str
    typed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not getattr(self, "exit_on_error", True):
            super().error(message, ex)
        prog = self.prog.replace(" [options]", "")
        complaint = explain(message, known_keys(self))
        print(f"{prog}: error: {place_in_files(complaint, Strict.typed)}{complaint}", file=sys.stderr)
        print(f"all options: {prog} --help=all", file=sys.stderr)
        raise SystemExit(2)


class StrictParser(Strict, ArgumentParser):
    """Parser of the commands that are plain functions."""


def known_keys(parser: Any) -> list[str]:
    """Dotted names of every option a parser and its subcommands have, without the leading dashes."""
    names = [
        option[2:]
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    ]
    for child in getattr(getattr(parser, "_subcommands_action", None), "_name_parser_map", {}).values():
        names += known_keys(child)
    return list(dict.fromkeys(names))


def check_syntax(args: Sequence[str]) -> None:
    """Read every YAML file named on the command line once: the parser's own message does not name the file.

    Raises:
        ValueError: a file is not YAML, with its name, line and column; or a config holds no settings.
    """
    Strict.typed = tuple(args)
    for flag, path in _yaml_files(args):
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
            raise ValueError(
                f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}"
            ) from error
        if flag in _CONFIG and not isinstance(found, dict):
            what = "empty" if found is None else f"holds a {type(found).__name__}"
            raise ValueError(
                f"{path}: {what}; a config is `key: value` lines, as `certdraft init demo` writes them"
            )


def _yaml_files(args: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Each option that names a YAML file, and the file."""
    for flag, value in zip(args, [*args[1:], ""], strict=False):
        name, _, attached = flag.partition("=")
        path = Path(attached or value)
        named = name in _CONFIG or path.suffix in (".yaml", ".yml")
        if name.startswith("-") and named and path.is_file():
            yield name, path


def place_in_files(complaint: str, args: Sequence[str]) -> str:
    """Where a complaint about a setting comes from: "FILE:LINE: ", or nothing if it was typed.

    Args:
        complaint: as `explain` words it: the first word in quotes, else the last key in front, is looked for.
        args: arguments as typed, with the files of settings among them.
    """
    quoted, key = re.search(r"'([\w.@-]+)'", complaint), re.match(r"[\w.]*?(\w+): ", complaint)
    word = quoted[1] if quoted else key[1] if key else ""
    if not word or any(word in arg for arg in args if not arg.endswith((".yaml", ".yml"))):
        return ""
    for _, path in _yaml_files(args):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if re.search(rf"(?<![\w.]){re.escape(word)}(?![\w])", re.sub(r"(^|\s)#.*", "", line)):
                return f"{path}:{number}: "
    return ""


def explain(message: str, keys: Iterable[str] = ()) -> str:
    """The deepest complaint in a jsonargparse message, on one line, with the nearest legal name.

    Examples:
        >>> explain("unrecognized arguments: --trainer.max_step 3", ["trainer.max_steps", "trainer.max_time"])
        "unrecognized option '--trainer.max_step'; did you mean '--trainer.max_steps'?"
    """
    trail: list[tuple[int, str, str]] = []  # (indent, "key" or "class", value)
    found: list[tuple[int, list[str], str | None, str]] = []  # (depth, keys, class, complaint)
    for line in message.splitlines():
        text = line.strip()
        if not text:
            continue
        indent = len(line) - len(line.lstrip())
        if text.startswith("- "):
            text, indent = text[2:].strip(), indent + 2
        trail = [entry for entry in trail if entry[0] < indent]
        if match := _KEY.match(text):
            trail.append((indent, "key", match["key"]))
            text = text[match.end() :].strip()
        if match := _CLASS.match(text):
            trail.append((indent, "class", match["path"]))
        if text and not _NOISE.match(text):
            path = [value for _, kind, value in trail if kind == "key"]
            owner = next((value for _, kind, value in reversed(trail) if kind == "class"), None)
            found.append((len(trail), path, owner, text))
    if not found:
        return " ".join(message.split())
    depth = max(entry[0] for entry in found)
    deepest = [entry for entry in found if entry[0] == depth]
    _, path, owner, complaint = deepest[0]
    where = ".".join(path) + ": " if path else ""
    if match := _OPTION.match(complaint):
        parts = (match["group"], match["a"] or match["b"] or match["c"] or match["d"])
        return where + _unknown(".".join(filter(None, parts)), owner, keys)
    if match := next((m for entry in found if (m := _PATH.match(entry[3])) and entry[1] == path), None):
        return f"{where}no such file: {match['name']}"
    if match := next((m for entry in deepest if (m := _IMPORT.match(entry[3]))), None):
        name = match["name"].strip("'\"")
        given = owner and ("No module" in match[0] or owner.endswith(f".{name}"))
        name = owner if owner and given else name
        return where + (_not_a_class(name, where[:-2].rpartition(".")[2]) or _no_class(name))
    several = " or ".join(
        dict.fromkeys(entry[3].removeprefix("Expected a ") for entry in deepest if entry[1] == path)
    )
    several = several.replace("<class 'dict'>", "a mapping, as in '{name: value}'")
    several = several.replace("typing.Literal[", "one of [")
    several = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", several).replace(". Got value: ", ", got ")
    return where + (f"expected {several}" if complaint.startswith("Expected a ") else several)


def _unknown(option: str, owner: str | None, keys: Iterable[str]) -> str:
    if owner is None:
        names, text, option = [f"--{key}" for key in keys], f"unrecognized option '--{option}'", f"--{option}"
    else:
        module, _, name = owner.rpartition(".")
        taker: Any = getattr(import_module(module), name)
        *parents, option = option.split(".")
        for parent in parents:
            if parent not in _arguments(taker):
                option = parent
                break
            taker = _annotation(taker, parent)
        names, text = _arguments(taker), f"{getattr(taker, '__name__', name)} has no option {option!r}"
    near = get_close_matches(option, names, n=1, cutoff=0.6)
    if near:
        return f"{text}; did you mean {near[0]!r}?"
    return f"{text}; it has {', '.join(names)}" if owner and names else text


def _annotation(taker: Any, argument: str) -> Any:
    """The class an argument is annotated with: (DrafterModule, "optimizer") → OptimizerSettings."""
    hint = get_type_hints(taker.__init__).get(argument)
    return next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and t is not type(None)), taker)


def _arguments(taker: Any) -> list[str]:
    try:
        parameters = inspect.signature(taker).parameters
    except (ValueError, TypeError):
        return []
    return [p for p in parameters if p not in ("self", "args", "kwargs")]


def _not_a_class(name: str, key: str) -> str | None:
    """Complaint about a name that means something else: a group that ships, or a folder of weights."""
    if shipped(f"{key}/{name}"):
        return f"no class {name!r}; the config of that name is {key}/{name}.yaml"
    if Path(name).is_dir():
        return f"{name} is a folder, not a class; the weights to begin with are `{key}.pretrained`"
    return None


def _no_class(name: str) -> str:
    """Complaint about a class that cannot be imported: why, or the nearest of this package's."""
    classes = {
        value.__name__
        for path, module in list(sys.modules.items())
        if path.startswith("certdraft.")
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.startswith("certdraft.")
    }
    if name.endswith((".yaml", ".yml", ".json")):
        return f"no such file: {name}"
    module = name.rpartition(".")[0]
    if module and (why := _not_imported(module)):
        return f"no class {name!r}: {why}"
    if module and not module.startswith("certdraft."):
        own = [key for key, value in vars(import_module(module)).items() if isinstance(value, type)]
        if near := get_close_matches(name.rpartition(".")[2], own, n=1, cutoff=0.5):
            return f"no class {name!r}; did you mean '{module}.{near[0]}'?"
    near = get_close_matches(name.rpartition(".")[2], sorted(classes), n=1, cutoff=0.6)
    return f"no class {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; give its full import path")


def _not_imported(module: str) -> str | None:
    """Why a module cannot be imported; None if it can."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            return (
                f"there is no module {error.name} where Python looks; install it, or name its folder, as in "
                "`PYTHONPATH=. certdraft …`"
            )
        return f"importing {module} fails: {error}"
    except Exception as error:  # whatever a user's module raises
        return f"importing {module} fails: {type(error).__name__}: {error}"
    return None
