"""Recording from an inference server over HTTP."""
