"""DSpark: a DFlash block whose positions are corrected by the token before them, with a confidence head."""
