"""Replay real traffic through the control plane that serves models, and say how much cache it needs."""
