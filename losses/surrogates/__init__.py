"""Certificate-derived losses."""
