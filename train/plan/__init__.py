"""Memory, disk and time of a run, estimated before it is started."""
