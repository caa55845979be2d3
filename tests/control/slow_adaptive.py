"""The adaptive rule once more, in plain Python: dictionaries and scans in place of hash tables, lists and heaps.

Requests come and go one after the other, as in `ContentCache.run`. The order of all sums is that of the rule, so that
the counts are equal and not only near.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

WORD = 2**64 - 1
EDGES = [b if b < 8 else (4 + b % 4) << (b // 4 - 1) for b in range(113)]
CLASSES, AGES = range(12), range(112)


def signed(word: int) -> int:
    word &= WORD
    return word - 2**64 if word >> 63 else word


def path_of(above: int, block: int) -> int:
    """The 64-bit name of a block of one token behind the prefix `above`."""
    mixed = ((above ^ block) & WORD) * 0x9E3779B97F4A7C15 & WORD
    mixed ^= mixed >> 31
    mixed = mixed * 0xBF58476D1CE4E5B9 & WORD
    return (mixed ^ (mixed >> 31)) | 1


def code_of(gap: int) -> int:
    """A logarithm in 1,024ths of an octave, linear within one, plus 1: 0 is none."""
    octave = gap.bit_length() - 1
    return 1024 * octave + (gap - (1 << octave)) * 1024 // (1 << octave) + 1


def gap_of(code: int) -> int:
    octave, part = divmod(code - 1, 1024)
    return (1024 + part) * 2**octave // 1024


def bucket(age: int) -> int:
    return min(bisect_right(EDGES, age) - 1, 111)


@dataclass
class Note:
    """What is known of a block or a ghost."""

    mark: int
    uses: int = 1
    kind: int | None = None
    let_go: int = 0
    when: int = 0
    gap: int = 0
    output: int = 0
    expected: int = 0


@dataclass
class Node:
    """One cached block."""

    place: int
    parent: int | None
    depth: int
    path: int
    note: Note
    children: int = 0


@dataclass
class Seen:
    """The last access to a sampled block."""

    group: int
    access: int
    expected: int
    let_go: int
    when: int


class Shadow:
    """A small cache: what goes is found by a scan, and is the oldest of its group, or also the newest."""

    def __init__(self, score: Callable[[Seen], int], goes_at_both_ends: bool = False) -> None:
        self.score, self.goes_at_both_ends = score, goes_at_both_ends
        self.seen: dict[int, Seen] = {}  # by path
        self.hits = 0  # in the present request

    def access(self, path: int, seen: Seen, began: int, grows: bool) -> None:
        self.hits += path in self.seen
        if path not in self.seen and not grows:
            del self.seen[self.first_to_go(began)]
        self.seen[path] = seen

    def first_to_go(self, began: int) -> int:
        ends: dict[tuple[int, bool], int] = {}  # by group, whether it is the newest
        for path, seen in self.seen.items():
            oldest, newest = (seen.group, False), (seen.group, True)
            if oldest not in ends or seen.access < self.seen[ends[oldest]].access:
                ends[oldest] = path
            is_free = self.goes_at_both_ends and seen.access < began
            if is_free and (newest not in ends or seen.access > self.seen[ends[newest]].access):
                ends[newest] = path

        def order(end: tuple[int, bool]) -> tuple[bool, int, tuple[int, bool]]:
            seen = self.seen[ends[end]]
            return seen.access >= began, self.score(seen), end

        return ends[min(ends, key=order)]


class Duel:
    """One order against recency."""

    def __init__(self, better: float, most_lead: float, memory: int) -> None:
        self.better, self.most_lead, self.memory = better, most_lead, memory
        self.lead = self.variance = self.seen = self.found = self.gain = 0.0
        self.won = False

    def end_request(self, lead: int) -> None:
        self.gain += lead
        self.lead += lead
        self.variance += lead * lead

    def judge(self) -> None:
        deviation = math.sqrt(self.variance)
        usual = self.better * self.found
        least = usual + 0.002 * self.seen
        if self.lead > least + 2.0 * deviation:
            self.won = True
        elif self.lead < usual - 0.5 * deviation:
            self.won = False
        self.most = min(least + 2.25 * deviation, self.most_lead)

    def fade(self, accesses: int) -> None:
        kept = 1 / (1 + 1 / 9 * (accesses / self.memory))
        self.seen *= kept
        self.found *= kept
        self.variance *= kept * kept
        self.lead = min(self.most, max(-self.most, self.lead * kept))


class Pauses:
    """How long a session waits, in octaves: recursive least squares with matrices as lists of rows."""

    def __init__(self) -> None:
        self.weights = [12.0, 0.5, 0.0, 0.0]
        self.doubts = [[50.0 * (i == j) for j in range(4)] for i in range(4)]
        self.count = 0

    def known(self, gap: int, output: int) -> list[float]:
        slow = (gap - 1) / 1024 - 12.0 if gap else 0.0
        return [1.0, slow, (output - 1) / 1024 - 8.0, float(gap == 0)]

    def expected(self, gap: int, output: int) -> int:
        if not output or self.count < 30:
            return gap
        octaves = math.log2(8 / 7)
        for weight, number in zip(self.weights, self.known(gap, output), strict=True):
            octaves += weight * number
        return int(min(max(1024 * octaves, 0), 29 * 1024)) + 1

    def learn(self, pause: int, gap: int, output: int) -> None:
        self.count += 1
        known, doubts = self.known(gap, output), self.doubts
        kept = 0.9995 if sum(doubts[i][i] for i in range(4)) < 200 else 1.0
        gains = [sum(doubt * number for doubt, number in zip(row, known, strict=True)) for row in doubts]
        certain, error = kept, (code_of(max(1, pause)) - 1) / 1024
        for weight, number, gain in zip(self.weights, known, gains, strict=True):
            certain += gain * number
            error -= weight * number
        step, more = 1 / certain, 1 / kept
        self.weights = [weight + gain * step * error for weight, gain in zip(self.weights, gains, strict=True)]
        self.doubts = [[(doubts[i][j] - gains[i] * gains[j] * step) * more for j in range(4)] for i in range(4)]


class SlowAdaptive:
    """A cache of `capacity` blocks under the adaptive rule."""

    def __init__(self, capacity: int, root: int) -> None:
        self.capacity, self.root = capacity, root
        self.nodes: dict[int, Node] = {}
        self.freed: list[int] = list(range(capacity))
        sampled = 1
        while capacity // (2 * sampled) >= 512:
            sampled *= 2
        self.sampled = sampled
        self.room = max(1, capacity // sampled)
        self.recent = Shadow(lambda seen: 0)
        self.expiring = Shadow(lambda seen: seen.let_go + self.life(seen.group))
        self.turning = Shadow(lambda seen: self.turn(seen.when, seen.expected), goes_at_both_ends=True)
        self.shadow_size = self.began = 0
        self.expiry_duel = Duel(0.0, 0.2 * self.room, capacity)
        self.turn_duel = Duel(0.09, math.inf, max(capacity, 4000))
        self.pauses = Pauses()
        self.pause: tuple[int, int, int] | None = None  # the last one that the present request ended
        self.output = 0
        self.ghosts: list[list[Note | None]] = [[None] * 4 for _ in range(max(1, 3 * capacity // 4))]
        self.heads: dict[int, Note] = {}  # by ghost set: the last block evicted from there with a gap of its own
        self.newest: int | None = None
        self.time = 0
        self.clock = self.accesses = self.lessons = self.share = 0
        self.rules = 0
        self.reigns = [0, 0, 0]
        self.flips = 0
        self.next_lesson = self.next_duel = capacity
        self.period = max(2048, capacity // 2)
        self.stores = self.releases = self.requests = 0.0
        self.reused = [[0.0] * 112 for _ in CLASSES]
        self.censored = [[0.0] * 112 for _ in CLASSES]
        self.released = [0.0] * 12
        self.short, self.long = [0] * 12, [0] * 12

    def run(
        self, requests: list[list[int]], times: list[float] | None = None, outputs: list[int] | None = None
    ) -> list[int]:
        seconds, written = times or [None] * len(requests), outputs or [0] * len(requests)
        return [self.serve(*each) for each in zip(requests, seconds, written, strict=True)]

    def serve(self, request: list[int], seconds: float | None, output: int) -> int:
        self.output, self.pause = code_of(output) if output and seconds is not None else 0, None
        if seconds is not None:
            self.time = int(256 * seconds)
        found = 0
        while found < len(request) and request[found] in self.nodes:
            note = self.nodes[request[found]].note
            self.reused[note.kind][bucket(self.clock - note.let_go)] += 1
            note.gap = self.gap_since(note)
            note.uses, note.kind = min(note.uses + 1, 255), None
            found += 1
        in_use = set(request[:found])
        places: list[int] = []
        for _ in request[found:]:
            if not self.freed and not self.evict_leaf(in_use):
                break
            places.append(self.freed.pop(0))
        for place, block in zip(places, request[found:], strict=False):
            self.store(place, block, request)
        taken = found + len(places)
        for block in reversed(request[:taken]):
            self.let_go(self.nodes[block])
        self.end(seconds is not None)
        return found

    def waited(self, now: int, when: int) -> int:
        return max(0, now - when)

    def gap_since(self, note: Note) -> int:
        """The geometric mean of the gap that just ended, one eighth of it, and of what stood there before."""
        pause, before = self.waited(self.time, note.when), note.gap
        self.pause = (pause, before, note.output) if note.output else None
        code = code_of(max(1, pause))
        return (7 * before + code + 4) // 8 if before else code

    def store(self, place: int, block: int, request: list[int]) -> None:
        depth = request.index(block)
        parent = request[depth - 1] if depth else None
        path = path_of(self.nodes[parent].path if depth else self.root, block)
        note = Note(mark=(path >> 1) & 0xFFFFFFFF, gap=self.nodes[parent].note.gap if depth else 0)
        ghosts = self.ghost_set(path)
        for i, ghost in enumerate(ghosts):
            if ghost is not None and ghost.mark == note.mark:
                note.uses = min(ghost.uses + 1, 255)
                self.reused[ghost.kind][bucket(self.clock - ghost.let_go)] += 1
                ghosts[i] = None
                break
        place_of_head = self.set_of(path)
        head = self.heads.get(place_of_head)
        is_asked = parent is None or parent != self.newest
        self.newest = block
        if is_asked and head is not None and head.mark == note.mark:
            note.gap = self.gap_since(head)
            del self.heads[place_of_head]
        self.clock += 1
        self.stores += 1
        self.nodes[block] = Node(place, parent, depth, path, note)
        if parent is not None:
            self.nodes[parent].children += 1

    def ghost_set(self, path: int) -> list[Note | None]:
        return self.ghosts[self.set_of(path)]

    def set_of(self, path: int) -> int:
        return ((path >> 32) * len(self.ghosts)) >> 32

    def evict_leaf(self, in_use: set[int]) -> bool:
        leaves = [b for b, node in self.nodes.items() if node.children == 0 and b not in in_use]
        if not leaves:
            return False
        block = min(leaves, key=lambda b: (self.score(self.nodes[b].note), self.nodes[b].place))
        if self.rules == 2:
            last = min(leaves, key=lambda b: (-self.end_of(self.nodes[b].note), self.nodes[b].place))
            age = self.waited(self.time, self.nodes[block].note.when)
            block = last if self.end_of(self.nodes[last].note) - self.time > age else block
        node = self.nodes.pop(block)
        before = self.nodes[node.parent].note if node.parent is not None else None
        if before is None or (before.when, before.gap) != (node.note.when, node.note.gap):
            self.heads[self.set_of(node.path)] = node.note
        if node.parent is not None:
            self.nodes[node.parent].children -= 1
        self.freed.append(node.place)
        ghosts = self.ghost_set(node.path)
        i = ghosts.index(None) if None in ghosts else min(range(4), key=lambda i: ghosts[i].let_go)
        if ghosts[i] is not None:
            self.censored[ghosts[i].kind][bucket(self.clock - ghosts[i].let_go)] += 1
        ghosts[i] = node.note
        return True

    def score(self, note: Note) -> int:
        return self.expiry(note.kind, note.let_go) if self.rules == 1 else note.let_go

    def end_of(self, note: Note) -> int:
        return note.when + gap_of(note.expected) if note.expected else 2**48 - note.when

    def turn(self, when: int, expected: int) -> int:
        age = self.waited(self.time, when)
        return -max(age, gap_of(expected) - age) if expected else -(2**48) - age

    def expiry(self, kind: int, let_go: int) -> int:
        return let_go + self.life(2 * kind + self.draw(let_go))

    def draw(self, let_go: int) -> bool:
        return ((let_go * 0x9E3779B97F4A7C15 & WORD) >> 24) & 0xFFFF < self.share

    def life(self, group: int) -> int:
        return self.long[group // 2] if group % 2 else self.short[group // 2]

    def let_go(self, node: Node) -> None:
        uses = node.note.uses
        rank = uses - 1 if uses <= 4 else 4 if uses <= 7 else 5
        kind = node.note.kind = 2 * rank + (node.children == 0)
        node.note.let_go, node.note.when, node.note.output = self.clock, self.time, self.output
        expected = node.note.expected = self.pauses.expected(node.note.gap, self.output)
        self.released[kind] += 1
        self.accesses += 1
        self.releases += 1
        if (node.path >> 8) % self.sampled:
            return
        for duel in (self.expiry_duel, self.turn_duel):
            duel.seen += 1
        grows = self.shadow_size < self.room and not any(node.path in shadow.seen for shadow in self.shadows)
        self.shadow_size += grows
        groups = (0, 2 * kind + self.draw(self.clock), (expected - 1) // 512 if expected else 63)
        for shadow, group in zip(self.shadows, groups, strict=True):
            shadow.access(node.path, Seen(group, self.accesses, expected, self.clock, self.time), self.began, grows)

    @property
    def shadows(self) -> tuple[Shadow, Shadow, Shadow]:
        return self.recent, self.expiring, self.turning

    def end(self, has_clock: bool) -> None:
        self.requests += 1
        for duel in (self.expiry_duel, self.turn_duel):
            duel.found += self.recent.hits
        self.expiry_duel.end_request(self.expiring.hits - self.recent.hits)
        self.turn_duel.end_request(self.turning.hits - self.recent.hits)
        for shadow in self.shadows:
            shadow.hits = 0
        self.began = self.accesses + 1
        if self.pause is not None:
            self.pauses.learn(*self.pause)
        if not has_clock:
            self.time = self.accesses
        if self.clock >= self.next_lesson:
            self.next_lesson = self.clock + self.period
            if len(self.freed) <= self.capacity // 16:
                self.learn()
        if self.accesses >= self.next_duel:
            self.next_duel = self.accesses + self.period
            if self.lessons:
                self.judge()
        self.reigns[self.rules] += 1

    def judge(self) -> None:
        before, expiry, turns = self.rules, self.expiry_duel, self.turn_duel
        for duel in (expiry, turns):
            duel.judge()
        self.rules = int(expiry.won)
        if turns.won and (not expiry.won or turns.gain > expiry.gain):
            self.rules = 2
        for duel in (expiry, turns):
            duel.fade(self.period)
            duel.gain *= 1 / (1 + 1 / 9 * (self.period / turns.memory))
        self.flips += self.rules != before

    def learn(self) -> None:
        hits, space = self.promises()
        self.choose(hits, space)
        for seen in self.expiring.seen.values():
            seen.group = seen.group // 2 * 2 + self.draw(seen.let_go)
        self.lessons += 1
        for table in (*self.reused, *self.censored, self.released):
            table[:] = [0.95 * value for value in table]
        self.stores *= 0.95
        self.releases *= 0.95
        self.requests *= 0.95

    def promises(self) -> tuple[list[list[float]], list[list[float]]]:
        waiting = [[0.0] * 112 for _ in CLASSES]
        ghosts = [ghost for four in self.ghosts for ghost in four if ghost is not None]
        for note in [node.note for node in self.nodes.values()] + ghosts:
            waiting[note.kind][bucket(self.clock - note.let_go)] += 1
        length = self.releases / self.requests
        pool, at_risk = [0.0] * 112, 0.0
        for b in reversed(AGES):
            events, left = 0.0, 0.0
            for c in CLASSES:
                events += self.reused[c][b]
                left += self.censored[c][b] + waiting[c][b]
            at_risk += events + left
            pool[b] = events / (at_risk - 0.5 * left + 2.5 * length)
        hazards: list[list[float]] = []
        hits, space = [], []
        for c in CLASSES:
            prior, hazard, at_risk = pool if c < 2 else hazards[c - 2], [0.0] * 112, 0.0
            for b in reversed(AGES):
                left = self.censored[c][b] + waiting[c][b]
                at_risk += self.reused[c][b] + left
                events = self.reused[c][b] + 10.0 * length * prior[b]
                hazard[b] = events / (at_risk - 0.5 * left + 10.0 * length)
            hazards.append(hazard)
            alive, brought, taken = 1.0, [0.0], [0.0]
            for b in AGES:
                gone = alive * hazard[b]
                brought.append(brought[-1] + gone)
                taken.append(taken[-1] + (alive - 0.5 * gone) * (EDGES[b + 1] - EDGES[b]))
                alive -= gone
            hits.append(brought)
            space.append(taken)
        return hits, space

    def choose(self, hits: list[list[float]], space: list[list[float]]) -> None:
        def at(price: float) -> tuple[list[int], float]:
            lives, occupied = [], 0.0
            for c in CLASSES:
                values = [hits[c][b] - price * space[c][b] for b in range(113)]
                best = max(range(113), key=values.__getitem__)
                lives.append(EDGES[best])
                occupied += self.released[c] / self.stores * space[c][best]
            return lives, occupied

        low, high = 0.0, 1.0
        self.short, fewest = at(high)
        self.long, most = self.short, 0.0
        for _ in range(63):
            price = math.sqrt(low * high) if low > 0.0 else high / 8
            lives, occupied = at(price)
            if occupied > self.capacity:
                low, self.long, most = price, lives, occupied
            else:
                high, self.short, fewest = price, lives, occupied
                if low == 0.0:
                    self.long = lives
            if high < 1e-12 or high < low * 1.0005:
                break
        share = (self.capacity - fewest) / (most - fewest) if most > fewest else 0.0
        self.share = int(65536 * min(1.0, max(0.0, share)))
