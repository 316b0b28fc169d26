"""Starts ranks as Tutel's launcher does: `python -m tutelx.integrations.tutel.launcher.run [-m] PROGRAM ...`."""
