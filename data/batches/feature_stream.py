"""Features that servers compute while a drafter trains: asked for with their batch, and never stored.

The trace holds everything else. So the order of batches, and what a resumed run sees, is that of any trace;
only the features, 2 L H bytes a token, come from somewhere else.

Letters: T tokens of a document · L layers · H hidden.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt16
from numpy import ndarray

from certdraft.data.corpus.chat import Prompt, PromptSet
from certdraft.data.record.learned_positions import Generation
from certdraft.data.record.recording import Recording, feature_size
from certdraft.data.record.server.feature_files import FeatureFiles
from certdraft.data.record.server.http_server import Server, ServerError
from certdraft.data.record.server.server_client import Client
from certdraft.data.targets import load_tokenizer, target_config
from certdraft.data.trace.arrow_trace import Trace

_COMPARED_POSITIONS, _COMPARED_DOCUMENTS = 200, 8
_LEAST_AGREEMENT = 0.8  # of greedy tokens; a rounded or quantised target stays above 0.9


class FeatureStream:
    """Features of the documents of one trace, from vLLM servers that run its target.

    Args:
        trace: whose documents.
        layers: 0-based target layers, in the order of the L axis.
        server: addresses, and `features_dir`.

    Raises:
        ValueError: no shared folder, another server than vLLM, or layers that the target does not have.
    """

    def __init__(self, trace: Trace, layers: tuple[int, ...], server: Server) -> None:
        if server.features_dir is None or server.api != "completions":
            raise ValueError(
                "features while training come from vLLM (server.api=completions) through a shared folder: "
                "give data.server.features_dir"
            )
        settings, longest = trace.meta.settings, int(trace.lengths.max(initial=1))
        self.trace = trace
        recording = Recording(
            target=trace.meta.target,
            generation=Generation(max_new_tokens=0, max_length=longest + 1, loops="keep"),
            tokenizer=settings.get("tokenizer"), revision=settings.get("revision"), num_kept=1,
            feature_layers=layers,
        )  # fmt: skip
        self.size = feature_size(recording)
        config = target_config(recording.target, revision=recording.revision)
        tokenizer = load_tokenizer(recording.tokenizer or recording.target, revision=recording.revision)
        # of this process only: two runs may train on one trace
        owner = trace.path / f"stream-{os.getpid()}"
        files = FeatureFiles(server.features_dir, layers, self.size, owner, server.timeout_s)
        self._compared = self._documents_to_compare()
        prompts = PromptSet(self._prompts())
        self._client = Client(recording, server, tokenizer, prompts, config, files)
        self._pool = ThreadPoolExecutor(self._client.replicas.threads, "features")
        atexit.register(self.close)  # a Trainer that fails calls no teardown

    def check(self) -> None:
        """Ask every server once, and compare its greedy tokens with the trace's.

        Raises:
            ServerError: what a server lacks; or it serves other weights than the trace was recorded with.
        """
        self._client.check()
        agree = total = 0
        for number, document in enumerate(self._compared):
            row, columns = self._client.row(len(self.trace) + number), self.trace.columns(document)
            mask = columns.loss_mask
            agree += int((row.top_ids[mask, 0] == columns.top_ids[mask, 0]).sum())
            total += int(mask.sum())
        if agree < _LEAST_AGREEMENT * total:
            raise ServerError(
                f"the server's most probable token is the trace's at {agree} of {total} positions of "
                f"{self.trace.path}: it serves other weights than {self.trace.meta.target}, with which the "
                "trace was recorded"
            )

    def of_documents(self, documents: Iterable[int]) -> dict[int, UInt16[ndarray, "T L H"]]:
        """Features of whole documents, bits of bf16 numbers; `server.concurrency` are asked for at once.

        Raises:
            ServerError: every server is down, or one sends what cannot be used.
        """
        wanted = {int(document): self._pool.submit(self._features, int(document)) for document in documents}
        try:
            return {document: future.result() for document, future in wanted.items()}
        except ServerError as error:
            raise ServerError(
                f"features of the next batch: {error} For training that is with --ckpt_path last: it goes on "
                "at its last checkpoint, with the same batches"
            ) from error
        finally:
            for future in wanted.values():
                future.cancel()

    def close(self) -> None:
        """Cancel what is in flight, and delete the files of abandoned requests."""
        atexit.unregister(self.close)
        self._client.close()
        self._pool.shutdown(cancel_futures=True)

    def _features(self, document: int) -> UInt16[ndarray, "T L H"]:
        hidden = self._client.row(document).hidden
        assert hidden is not None
        return hidden

    def _prompts(self) -> Iterator[Prompt]:
        """Every document as text to read, without logits; then those to compare, with them."""
        for document in range(len(self.trace)):
            ids = np.array(self.trace.columns(document).input_ids)
            yield Prompt(ids, len(ids), f"{self.trace.path}, document {document}")
        for document in self._compared:
            yield Prompt(np.array(self.trace.columns(document).input_ids), 1, f"document {document}")

    def _documents_to_compare(self) -> list[int]:
        found, positions = [], 0
        for document in np.flatnonzero(self.trace.counted)[:_COMPARED_DOCUMENTS].tolist():
            if positions < _COMPARED_POSITIONS:
                found.append(document)
                positions += int(self.trace.counted[document])
        return found
