"""Certificates over a trace, with and without a drafter."""
