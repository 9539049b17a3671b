"""Pruning events, and the checks, forecasts and sensitivity scans before the first event."""
