"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Passes a text on, piece by piece, up to the first stop string.

    The first is the one that ends first; of those that end at the same place the longest. So the result does not
    depend on how the text is cut into pieces. What may yet turn out to be the beginning of a stop string is held back.
    Takes a constant time a character on average, whatever the stop strings are (Knuth, Morris and Pratt 1977, "Fast
    Pattern Matching in Strings").

    Parameters
    ----------
    stops : sequence of str
        None of them empty.
    include : bool
        Pass the stop string on as well.

    Attributes
    ----------
    matched : str, optional
        The stop string that was found.
    """

    __slots__ = ("_borders", "_held", "_include", "_reached", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._reached = [0] * len(self._stops)  # how much of each stop string the text ends with
        self._held = ""
        self._include = include
        self.matched: str | None = None

    def push(self, piece: str, *, search: bool = True) -> str:
        """Take the next piece and return what may be passed on.

        Parameters
        ----------
        piece : str
        search : bool
            False lets the piece, and what was held back, pass unsearched.
        """
        if self.matched is not None:
            return ""
        if not search:
            self._reached = [0] * len(self._stops)
            return self.flush() + piece
        text, before = self._held + piece, len(self._held)
        for place, character in enumerate(piece, start=before + 1):
            found = self._advance(character)
            if found is not None:
                self.matched, self._held = found, ""
                return text[: place if self._include else place - len(found)]
        free = len(text) - max(self._reached, default=0)
        self._held = text[free:]
        return text[:free]

    def flush(self) -> str:
        """Return what is held back: the text ends here."""
        held, self._held = self._held, ""
        return held

    def copy(self) -> StopStrings:
        """Return one that has seen the same text."""
        other = object.__new__(StopStrings)
        for name in StopStrings.__slots__:
            setattr(other, name, getattr(self, name))
        other._reached = self._reached.copy()
        return other

    def _advance(self, character: str) -> str | None:
        longest: str | None = None
        for which, stop in enumerate(self._stops):
            reached, borders = self._reached[which], self._borders[which]
            while reached and stop[reached] != character:
                reached = borders[reached - 1]
            reached += stop[reached] == character
            self._reached[which] = reached
            if reached == len(stop) and (longest is None or len(stop) > len(longest)):
                longest = stop
        return longest


def _borders(stop: str) -> list[int]:
    """Return for each prefix the length of its longest proper prefix that it also ends with."""
    borders = [0] * len(stop)
    for place in range(1, len(stop)):
        length = borders[place - 1]
        while length and stop[length] != stop[place]:
            length = borders[length - 1]
        borders[place] = length + (stop[length] == stop[place])
    return borders
