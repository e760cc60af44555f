"""certdraft: train drafters for speculative decoding against acceptance certificates.

Importing this package imports no torch, so `certdraft --help` stays instant.
"""

__version__ = "0.1.0"
