"""The command line: `certdraft`, `lightning` and `python -m certdraft` are this one program.

A table answers help, version and misspelt commands without importing torch; the chosen command is imported
only then. Wrong input ends in one paragraph and exit code 2; CERTDRAFT_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from certdraft import __version__
from certdraft.train.commands.parsing.help_cache import show_help
from certdraft.train.commands.parsing.typed_paths import explicit


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        target: "module:function" to import when it is called.
        summary: one line of help.
        argument: option that a path directly after the command belongs to; with "*" it takes a list, with "@"
            names for paths.
        configs: options that take a config by its name, besides --config.
        runs: options that take a run folder, or `latest`.
    """

    target: str
    summary: str
    argument: str | None = None
    configs: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()


_HERE = "certdraft.train.commands"
_REPORT = "certdraft.evaluation.report"
TRAINER = f"{_HERE}.lightning_cli:run"
COMMANDS = {
    "demo": Command(f"{_HERE}.demo:demo", "all of it on the embedded target, in minutes"),
    "real": Command(f"{_HERE}.real:real", "all of it on a real 135M model, in 45 minutes"),
    "configs": Command("certdraft.train.runs.config_files:configs", "configs that ship", "containing"),
    "init": Command(
        "certdraft.train.runs.config_files:init", "copy a config that ships, to change it", "name"
    ),
    "doctor": Command(
        f"{_HERE}.doctor:doctor", "what this machine has, and what is missing", configs=("fit_config",)
    ),
    "plan": Command(
        "certdraft.train.plan.plan_command:plan",
        "memory, disk and time of a run, estimated",
        "run",
        configs=("run",),
    ),
    "prompts": Command("certdraft.data:write_prompts", "prompts that an instruct model writes itself"),
    "trace": Command(
        "certdraft.data:record_trace", "record a target's outputs along its greedy text", "out_dir"
    ),
    "certify": Command(
        "certdraft.evaluation:run_certify", "how hard a target is to draft for, from a trace", "trace"
    ),
    "fit": Command(TRAINER, "train a drafter (LightningCLI)", "config"),
    "validate": Command(TRAINER, "validation metrics of a checkpoint (LightningCLI)", "config"),
    "test": Command(TRAINER, "the same metrics on the test split (LightningCLI)", "config"),
    "sweep": Command(
        f"{_HERE}.sweep:sweep", "run a W&B sweep file here, without W&B", "file", configs=("file",)
    ),
    "reproduce": Command(
        f"{_HERE}.reproduce:reproduce", "run a run again, and compare the weights", "run", runs=("run",)
    ),
    "export": Command(
        f"{_HERE}.export_command:export_run",
        "a checkpoint as a folder that engines load",
        "run",
        runs=("run",),
    ),
    "lint": Command(
        f"{_HERE}.export_command:lint", "check a folder before an engine reads it wrongly", "path"
    ),
    "profile": Command(
        "certdraft.evaluation:run_profile", "cost of drafting and verifying on this machine", "drafter"
    ),
    "evaluate": Command(
        "certdraft.evaluation:run_evaluate", "drafters side by side: acceptance, τ, speed", "drafters@"
    ),
    "bench": Command(
        "certdraft.evaluation:run_bench", "a drafter in the engine that serves it, at rising load"
    ),
    "arbitrate": Command("certdraft.arbitration:run_arbitrate", "a learned policy that settles mismatches"),
    "compare": Command(
        f"{_REPORT}.compare:compare", "runs and reports side by side on one page", "runs*", runs=("runs",)
    ),
    "publish": Command(
        f"{_REPORT}.publish:publish", "a report as a W&B run, a drafter to the hub", "folder", runs=("run",)
    ),
    "completion": Command(f"{_HERE}.parsing.completion:completion", "completion script of a shell", "shell"),
}

_EXAMPLE = "certdraft fit --config configs/demo.yaml"
_ENVIRONMENT = {
    # No telemetry unless the user turned it on.
    "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_ERROR_REPORTING": "false", "DO_NOT_TRACK": "1",
    # Lightning's command line uses some of jsonargparse's deprecated calls.
    "JSONARGPARSE_DEPRECATION_WARNINGS": "off",
}  # fmt: skip
_LIBRARY_ERRORS = {
    "MisconfigurationException",
    "SafetensorError",
    "UsageError",
    "AuthenticationError",
}  # by name: importing them costs seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: arguments after the program's name; the process's own by default.

    Raises:
        SystemExit: code 2 for wrong input, 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    prog = _program()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    if not args or args[0] in ("-h", "--help"):
        guard(lambda: print(usage(prog), flush=True), prog)
        return
    if args[0] in ("-V", "--version"):
        print(f"certdraft {__version__}")
        return
    name = args[0]
    if name not in COMMANDS:
        raise SystemExit(_unknown(prog, name))
    label = f"{prog} {name}"

    command = COMMANDS[name]

    def act() -> None:
        typed = explicit(args[1:], command.argument, command.configs, command.runs)
        if command.target == TRAINER:
            if not typed:
                raise ValueError(
                    f"no settings; give a config, as in `{label} --config configs/demo.yaml` "
                    f"(all options: {label} --help=all)"
                )
            from certdraft.train.commands.parsing.hub_target import refuse_unreachable

            if "--print_config" not in typed:
                refuse_unreachable(
                    typed
                )  # torch and Lightning, imported below, take longer than a hub's answer
        _load(command)(name, typed, label)

    def shorten() -> None:
        from certdraft.train.commands.parsing.short_help import short_help

        print(short_help(label), end="")

    if args[1:] in (["-h"], ["--help"], ["--help=all"]):
        short = command.target == TRAINER and args[1] != "--help=all"
        args = [name, "--help"]
        show_help(f"{label} short" if short else label, lambda: guard(shorten if short else act, label))
        raise SystemExit(0)
    guard(act, label)


def captured(args: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command that only prints."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def guard(act: Callable[[], Any], label: str) -> Any:
    """Call `act`; wrong input becomes one paragraph on stderr and exit code 2."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a script's background jobs
    try:
        return act()
    except KeyboardInterrupt:
        print(f"{label}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except SystemExit as stop:
        # After Ctrl-C Lightning ignores further ones and exits with 1.
        if stop.code == 1 and not ignored and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            raise SystemExit(130) from None
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the pipe is closed
        raise SystemExit(141) from None
    except Exception as error:
        if os.environ.get("CERTDRAFT_DEBUG") or not _mendable(error):
            raise
        print(f"{label}: error: {_paragraph(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def usage(prog: str) -> str:
    """The top-level help text."""
    rows = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: {prog} COMMAND [options]\n\n"
        f"Train drafters for speculative decoding against acceptance certificates.\n\n{rows}\n\n"
        f"  {prog} COMMAND --help          options of a command\n"
        f"  {prog} COMMAND --print_config  its settings as YAML\n"
        f"  {prog} --version\n\nstart with `{prog} demo`, then `{_EXAMPLE}`"
    )


def _unknown(prog: str, name: str) -> int:
    if name.startswith("-"):
        message = f"the command comes first: {prog} COMMAND {name} …"
    else:
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        message = f"no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    print(f"{prog}: error: {message}\ncommands: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def _load(command: Command) -> Callable[[str, list[str], str], Any]:
    module, _, attribute = command.target.partition(":")
    if command.target == TRAINER:
        return getattr(import_module(module), attribute)

    def run(name: str, args: list[str], prog: str) -> Any:
        from jsonargparse import auto_cli

        from certdraft.train.commands.parsing.parser import StrictParser, check_syntax

        check_syntax(args)
        function = getattr(import_module(module), attribute)
        return auto_cli(function, args, as_positional=False, parser_class=StrictParser, prog=prog)

    return run


def _program() -> str:
    name = Path(sys.argv[0]).name
    return name if name in ("certdraft", "lightning") else "certdraft"


def _mendable(error: Exception) -> bool:
    """Whether the message is meant for the user; bugs (KeyError, TypeError, …) keep their traceback."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, ValueError | OSError) or bool(names & _LIBRARY_ERRORS)


def _paragraph(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" while writing {error.filename}" if error.filename else ""
        why = os.strerror(error.errno).lower()
        return f"no space left on the disk{where} ({why}); free some and run the same command again"
    if isinstance(error, FileNotFoundError) and error.filename and error.errno is not None:
        return f"no such file or folder: {error.filename}"
    if type(error).__module__.startswith("wandb") and "key" in str(error).lower():
        return "W&B has no API key: `wandb login`, or keep the run on this machine with WANDB_MODE=offline"
    if str(error).startswith("Does not validate against any"):  # an error of a constructor, wrapped
        from certdraft.train.commands.parsing.parser import explain

        return explain(str(error))
    return str(error).strip() or type(error).__name__
