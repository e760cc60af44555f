"""How a command line is read: parsers, the classes it may name, cached help, shell completion."""
