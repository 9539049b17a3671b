"""Pruning events, and the checks, estimates and sensitivity scans before the first event."""
