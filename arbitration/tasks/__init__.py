"""Problems with checkable answers, and their verifiers."""
