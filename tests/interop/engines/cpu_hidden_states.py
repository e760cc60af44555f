"""vLLM's hidden-states connector on a CPU, which lacks the pinned memory that it copies to."""

from unittest import mock

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
)

empty_like = torch.empty_like


def unpinned(*args, pin_memory=False, **kwargs):
    return empty_like(*args, **kwargs)


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending):
        with mock.patch.object(torch, "empty_like", unpinned):
            super()._submit_async_write(pending)
        self._req_copy_events[pending.req_id].query = lambda: True  # its stand-in for events has none
