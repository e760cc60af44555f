"""Recording a trace: greedy generation by a local target or a server."""
