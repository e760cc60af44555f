"""Run Python that a model wrote in a separate process with limits.

The child is started isolated (`-I -S -B`: no environment, no site packages, no bytecode), in an empty folder
that is removed afterwards, with an empty environment, in its own session. It limits itself before it reads
the program: CPU seconds, address space, file size, open files, no core dumps, and (except for root, whom
Linux does not count) no further processes. Wall time is kept by the parent, which kills the session and then
every process that still works in the folder.

This is not a security boundary. It stops endless loops, memory hogs and stray files of an honest model's
mistakes. Known limits:

* The child has the file permissions and the network of its user.
* The program shares its interpreter with the tests. A hostile one can read the end mark from the open pipe,
  return objects that equal everything, or replace what the tests call, and so pass.
* As root, or where processes are not limited, a child that leaves both the session and the folder survives.

Run hostile models in a container or virtual machine without network, with its own process namespace.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs in the child. The nonce waits in a pipe and is read, and written to stdout, only after the program has
# ended by itself: `exit()` in the middle is not a success, and no stack frame holds the nonce meanwhile.
_CHILD = """
import sys
try:
    import resource
    cpu, memory, file = map(int, sys.argv[2:5])
    limits = [("CPU", cpu), ("AS", memory), ("FSIZE", file), ("NOFILE", 32), ("CORE", 0), ("NPROC", 0)]
    for name, value in limits:
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        except (AttributeError, ValueError, OSError):
            pass
    del resource, limits
except ImportError:
    pass
def main():
    pipe, program = int(sys.argv[1]), sys.stdin.read()
    sys.argv[:] = ["program"]
    os = __import__("os")
    out, read, write = sys.__stdout__.fileno(), os.read, os.write
    del os
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    finally:
        sys.stdout.flush()
    write(out, b"\\n" + read(pipe, 64))
main()
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "ok": it ran to its end. "error": an exception, an early exit, or a signal, the limits on
            memory, files and CPU time among them. "timeout": killed by the clock.
        output: what it printed, at most `output_bytes`.
        detail: last line of its standard error.
    """

    status: Literal["ok", "error", "timeout"]
    output: str
    detail: str


def run_python(
    program: str, *, timeout_s: float = 3.0, memory_bytes: int = 512 << 20, output_bytes: int = 1 << 16
) -> Outcome:
    """Run a Python program in a separate, limited process.

    Args:
        program: source text.
        timeout_s: wall-clock seconds; the limit on CPU seconds is the next whole number above.
        memory_bytes: address space.
        output_bytes: of standard output, of standard error, and of every file it writes.

    Raises:
        ValueError: a limit that is not positive.
        OSError: the child cannot be started.

    Examples:
        >>> run_python("print(6 * 7)")
        Outcome(status='ok', output='42', detail='')
        >>> run_python("exit()").status
        'error'
    """
    if not timeout_s > 0 or memory_bytes < 1 or output_bytes < 1:
        raise ValueError(f"limits must be positive: {timeout_s=}, {memory_bytes=}, {output_bytes=}")
    nonce = secrets.token_hex(16)
    limits = (str(int(timeout_s) + 1), str(memory_bytes), str(output_bytes))
    with tempfile.TemporaryDirectory(prefix="certdraft-sandbox-") as folder:
        # Output goes to files, not pipes: the file-size limit then holds for it, and no reader can stall.
        outside = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        with outside[0] as out, outside[1] as err:
            pipe, end = os.pipe()
            try:
                os.write(end, nonce.encode())
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _CHILD, str(pipe), *limits],
                    stdin=subprocess.PIPE, stdout=out, stderr=err, cwd=folder, env={},
                    start_new_session=True, pass_fds=(pipe,),
                )  # fmt: skip
            finally:
                os.close(pipe)
                os.close(end)
            timed_out = False
            try:
                process.communicate(program.encode("utf-8", "replace"), timeout=timeout_s)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _kill_session(process)
                _kill_processes_in(folder)
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read(2 * output_bytes).decode("utf-8", "replace"))
    output, ended, _ = texts[0].rpartition("\n" + nonce)
    detail = (texts[1].strip().splitlines() or [""])[-1]
    if timed_out:
        return Outcome("timeout", texts[0][:output_bytes], f"killed after {timeout_s:g} s")
    if not ended or process.returncode:
        code = process.returncode
        how = detail or (signal.Signals(-code).name if code < 0 else f"exit code {code}, before its end")
        return Outcome("error", texts[0][:output_bytes], how)
    return Outcome("ok", output[:output_bytes].rstrip("\n"), detail)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and everything in its session, then wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _kill_processes_in(folder: str) -> None:
    """Kill processes whose working directory is in `folder`: those that left the session. Linux only."""
    inside = os.path.realpath(folder)
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(link).startswith(inside):
                os.kill(int(link.parent.name), signal.SIGKILL)
        except OSError:  # another user's process, or one that has just ended
            continue
