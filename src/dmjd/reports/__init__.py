"""Pictures and pages from numbers."""
