"""Features that a vLLM server writes to a shared folder: waited for, checked, read and deleted.

vLLM, started with the speculative method `extract_hidden_states` and its ExampleHiddenStatesConnector,
answers with the path of a safetensors file before that file is written. PATH.lock exists by then, and is
locked (flock) until the file is whole. The file holds `token_ids` [T − 1], the prompt and all generated
tokens but the last, which the model never reads, and `hidden_states` [T − 1, L, H], with layers in ascending
order. It does not say which layers they are: the name of its folder does, because `serve_command` names it
after them.

Letters: T tokens of a document · L layers · H hidden.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import UInt16
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from certdraft.data.record.generation import TargetError
from certdraft.data.record.server.http_server import ServerError
from certdraft.data.record.server.serve_command import engine_layers, layers_folder
from certdraft.data.trace.shards import RecordingError
from certdraft.support import bits_of

_GRACE_S = 1.0  # for a file that a network file system shows later than its lock
_HEADER_BYTES = 1 << 16
_PLAIN = re.compile(r"[\w-][\w.-]*\.safetensors")


class LostFile(ServerError):
    """The file of an answer is missing or broken off; asking again may help."""


class FeatureFiles:
    """Files of one recording in the shared folder, read from any thread.

    Args:
        root: the shared folder as this machine sees it; the files lie in `layers_folder(layers)` within.
        layers: 0-based layers of the target, in the order in which they are wanted.
        size: H.
        owner: folder of the trace; names of its files begin with a hash of it, so that a later recording
            into it finds files that a killed one left.
        timeout_s: how long an answer's file is waited for.
    """

    def __init__(self, root: str, layers: Sequence[int], size: int, owner: Path, timeout_s: float) -> None:
        self.folder = Path(root).expanduser() / layers_folder(layers)
        self.layers, self.size, self.timeout_s = tuple(layers), size, timeout_s
        place = f"{socket.gethostname()}:{owner.expanduser().resolve()}"
        self.tag = f"certdraft-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
        self._ended, self._opened = threading.Event(), False
        ids = engine_layers(layers)
        self._order = [ids.index(layer + 1) for layer in layers]  # from the file's order to the wanted one

    def open(self, tokens: int) -> None:
        """Delete what a killed recording left, and check that answers in flight have room.

        Args:
            tokens: of all requests in flight at once, at most.

        Raises:
            RecordingError: the folder is missing or cannot be written, or the disk is too small.
        """
        if not self.folder.is_dir() or not os.access(self.folder, os.W_OK | os.X_OK):
            raise RecordingError(
                f"server.features_dir: {self.folder} is not a folder that this process may write; it must be "
                "the server's shared_storage_path as this machine sees it, and features are deleted from it"
            )
        needed, free = 2 * tokens * len(self.layers) * self.size, shutil.disk_usage(self.folder).free
        if needed > free:
            raise RecordingError(
                f"{self.folder}: features of the requests in flight may take {needed / 1e9:.3g} GB, "
                f"{free / 1e9:.3g} GB are free; lower server.concurrency or generation.max_length"
            )
        self._opened = True
        self._sweep()

    def name(self) -> str:
        """A name for a request, which the server makes part of its file's name."""
        return f"{self.tag}-{uuid.uuid4().hex}"

    def pause(self, seconds: float) -> None:
        """Sleep, at most until `close`."""
        self._ended.wait(seconds)

    def close(self) -> None:
        """End all waiting, and delete the files of requests that were abandoned."""
        self._ended.set()
        if self._opened:  # otherwise another process may be recording into the trace
            self._sweep()

    def take(self, path: object, ids: Sequence[int], where: str) -> UInt16[ndarray, "T L H"]:
        """Wait for a file, read it and delete it.

        Args:
            path: as the server gave it.
            ids: the T tokens that it must belong to.
            where: row of the corpus, for errors.

        Returns:
            Bits of bf16 numbers.

        Raises:
            LostFile: not there although its lock is free, or broken off.
            ServerError: no lock in time, or a file of something else: other tokens, layers or sizes.
            TargetError: NaN or inf, naming row and token.
        """
        file = self._local(path)
        lock = file.with_name(f"{file.name}.lock")
        descriptor = self._locked(lock, where)
        try:
            features = self._read(file, ids, where)
        finally:
            os.close(descriptor)
        for name in (lock, file):
            self._delete(name)
        return features

    def _local(self, path: object) -> Path:
        """Return the file as this machine sees it; never one outside the shared folder."""
        given = PurePosixPath(path) if isinstance(path, str) else PurePosixPath()
        if not _PLAIN.fullmatch(given.name):
            raise ServerError(
                f"the server names {path!r} as file of features; it runs another connector than "
                "ExampleHiddenStatesConnector, or another version of it"
            )
        if given.parent.name != self.folder.name:
            raise ServerError(
                f"the server writes features to {str(given.parent)!r}; for feature_layers="
                f"{list(self.layers)} that folder must be called {self.folder.name!r}, after the layers as "
                "vLLM counts them. If the server was started for other layers, start it for these; "
                "`certdraft trace` without server.url and with server.features_dir prints the line"
            )
        return self.folder / given.name

    def _locked(self, lock: Path, where: str) -> int:
        """A descriptor of the lock file, held shared. The server's own is gone when the file is whole."""
        end, pause = time.monotonic() + self.timeout_s, 0.002
        descriptor = -1
        while True:
            try:
                if descriptor < 0:
                    descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return descriptor
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EAGAIN, errno.EACCES) or time.monotonic() > end:
                    if descriptor >= 0:
                        os.close(descriptor)
                    raise self._no_lock(lock, descriptor >= 0, error, where) from None
            if self._ended.wait(pause):
                if descriptor >= 0:
                    os.close(descriptor)
                raise ServerError(f"{where}: the recording has ended")
            pause = min(2 * pause, 0.1)

    def _no_lock(self, lock: Path, found: bool, error: OSError, where: str) -> ServerError:
        after = f"within server.timeout_s={self.timeout_s:g}"
        if found and error.errno == errno.EAGAIN:
            return ServerError(f"{where}: the server has not written {lock.stem} {after}; see its log")
        if error.errno == errno.ENOENT:
            return ServerError(
                f"{where}: no {lock.name} in {lock.parent} {after}; either the server writes to another "
                "folder than server.features_dir shows here, or it was started with "
                "use_synchronization_lock false"
            )
        return ServerError(f"{where}: {lock} cannot be locked: {os.strerror(error.errno or 0)}")

    def _read(self, file: Path, ids: Sequence[int], where: str) -> UInt16[ndarray, "T L H"]:
        most = _HEADER_BYTES + len(ids) * (8 + 4 * len(self.layers) * self.size)  # fp32 at most
        end = time.monotonic() + _GRACE_S
        while True:
            try:
                with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as handle:
                    content = handle.read(most + 1)
                if len(content) > most:
                    raise ServerError(
                        f"{where}: {file} is longer than {most:,} bytes, more than {len(ids)} tokens of "
                        f"{len(self.layers)} × {self.size} features take; the server extracts other layers "
                        "or serves another model"
                    )
                tensors = load(content)
                break
            except FileNotFoundError:
                lost = f"{where}: {file} was not written; see the server's log, its disk may be full"
            except SafetensorError as error:
                lost = f"{where}: {file} is not whole ({error})"
            except OSError as error:
                raise ServerError(f"{where}: {file}: {os.strerror(error.errno or 0)}") from None
            if time.monotonic() > end or self._ended.wait(0.05):
                raise LostFile(lost)
        return self._checked(tensors, ids, where)

    def _checked(
        self, tensors: dict[str, Tensor], ids: Sequence[int], where: str
    ) -> UInt16[ndarray, "T L H"]:
        tokens, hidden = tensors.get("token_ids"), tensors.get("hidden_states")
        if tokens is None or hidden is None:
            raise ServerError(
                f"{where}: the server's file holds {', '.join(sorted(tensors)) or 'nothing'}, not token_ids "
                "and hidden_states; it runs another connector than ExampleHiddenStatesConnector"
            )
        if tokens.tolist() != list(ids):
            raise ServerError(
                f"{where}: the server's features are of {tokens.numel()} tokens that are not the {len(ids)} "
                "of its answer"
            )
        wanted = (len(ids), len(self.layers), self.size)
        if tuple(hidden.shape) != wanted or not hidden.is_floating_point():
            raise ServerError(
                f"{where}: the server's features are {hidden.dtype} of shape {tuple(hidden.shape)}, "
                f"wanted are tokens × layers × hidden size {wanted}; it extracts other layers or serves "
                "another model"
            )
        features = hidden.to(torch.bfloat16)
        if (bad := ~torch.isfinite(features).all(-1).all(-1)).any():
            raise TargetError(
                f"{where}, token {int(bad.nonzero()[0]) + 1} of the document: the server's features hold NaN "
                "or inf; nothing of this shard was written. Check the checkpoint that it serves"
            )
        return bits_of(features[:, self._order])

    def _delete(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise ServerError(
                f"{file} cannot be deleted ({os.strerror(error.errno or 0)}), so features would fill the "
                "disk; give this process write access to the folder"
            ) from None

    def _sweep(self) -> None:
        for file in self.folder.glob(f"*{self.tag}-*.safetensors*"):
            self._delete(file)


def with_last_token(features: UInt16[ndarray, "T L H"], tokens: int) -> UInt16[ndarray, "T L H"]:
    """Features of a whole document: zeros stand for a last token that the server's model never read.

    That position predicts nothing: it is never in a loss mask, and no other position reads it.
    """
    missing = np.zeros((tokens - len(features), *features.shape[1:]), np.uint16)
    return np.concatenate([features, missing])
