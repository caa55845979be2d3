"""``--weights``: what it refuses, and that the text is that of the weights in 8 bits."""

from __future__ import annotations
