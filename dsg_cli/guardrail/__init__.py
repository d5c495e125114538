"""The method: statistics, selection, probe, calibration, and the guarded model."""
