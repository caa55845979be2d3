"""Shadow caches over a hashed sample of the content, one for each order that may rule, and the duels between them.

All see the same accesses. When an order is significantly ahead of recency, it rules the real cache, and recency as
soon as it is behind: that bounds the loss on traffic which cannot be learned. Sampling by hash takes all accesses of a
block or none, so a small shadow behaves as the large cache does (Waldspurger et al., "Efficient MRC construction with
SHARDS", FAST 2015); contests between policies are those of set dueling (Qureshi et al., "Adaptive insertion policies
for high performance caching", ISCA 2007).

In each order, blocks fall into groups in which the one used last goes last: all of them by recency, those of one time
to live by expiry. By turns those of about the same gap are a group, of which the one used first or last goes. So a
shadow is a list for each group, and of the ends of all groups one goes. Shadows know no prefixes: of blocks released
together the deepest is evicted first. What the present request has used stays if it can, as it would in the real cache.
Until they are full all shadows hold the same blocks, so they have one size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedkv.control.lifetimes import draws_long
from pagedkv.control.state import CLASSES, EXPIRY, GROUPS, RECENCY, SHADOW_HEADS, TURNS, Learner
from pagedkv.control.turns import FIRST_TURNS, WORD, group_of, lengths_below, turn_score
from pagedkv.jit import called, inlined


def forget_shadows(learner: Learner) -> None:
    """Forget all that the shadow caches hold, but not who won."""
    for array in (learner.shadows, learner.heads, learner.places, learner.ends, learner.picks):
        array[:] = 0
    if len(learner.totals):
        totals = learner.totals[0]
        totals.entries = totals.free_entry = totals.shadow_size = 0


# Accesses.

HELD = 1 << 60


@called
def contend(learner: Learner, prefix_hash: int, kind: int, expected: np.uint16) -> None:
    """Let all shadows see an access to a sampled block, and count who had it."""
    totals = learner.totals[0]
    head = _head_of(prefix_hash)
    entry = learner.heads[head] - 1
    while entry >= 0 and learner.shadows[entry].prefix_hash != prefix_hash:
        entry = learner.shadows[entry].next - 1
    grows = False
    if entry < 0:
        entry = _new_entry(learner)
        learner.shadows[entry].prefix_hash = prefix_hash
        learner.shadows[entry].next = learner.heads[head]
        learner.heads[head] = entry + 1
        grows = totals.shadow_size < totals.room
        totals.shadow_size += grows
    else:
        _count_hits(learner, entry)
    totals.seen += 1.0
    shadow = learner.shadows[entry]
    shadow.expected = expected
    shadow.released = totals.clock
    shadow.time = totals.time & WORD
    shadow.access = totals.accesses
    _touch(learner, RECENCY, entry, 0, grows)
    _touch(learner, EXPIRY, entry, 2 * kind + (1 if draws_long(learner, totals.clock) else 0), grows)
    _touch(learner, TURNS, entry, group_of(expected), grows)


@inlined
def _count_hits(learner: Learner, entry: int) -> None:
    """Let those orders lead whose shadow has the entry over those whose shadow has not."""
    by_recency = 1 if learner.places[RECENCY, entry].group != 0 else 0
    learner.totals[0].found += by_recency
    for order in (EXPIRY, TURNS):
        by_this = 1 if learner.places[order, entry].group != 0 else 0
        learner.duels[order].request_lead += by_this - by_recency


@inlined
def _head_of(prefix_hash: int) -> int:
    return (prefix_hash >> 20) & (SHADOW_HEADS - 1)


@inlined
def _new_entry(learner: Learner) -> int:
    totals = learner.totals[0]
    entry = totals.free_entry - 1
    if entry >= 0:
        totals.free_entry = learner.shadows[entry].next
    else:
        entry = totals.entries
        totals.entries += 1
    return entry


@inlined
def _drop_if_unused(learner: Learner, entry: int) -> None:
    """Free an entry that is in no shadow."""
    for order in (RECENCY, EXPIRY, TURNS):
        if learner.places[order, entry].group != 0:
            return
    totals = learner.totals[0]
    head = _head_of(learner.shadows[entry].prefix_hash)
    link = learner.heads[head] - 1
    if link == entry:
        learner.heads[head] = learner.shadows[entry].next
    else:
        while learner.shadows[link].next != entry + 1:
            link = learner.shadows[link].next - 1
        learner.shadows[link].next = learner.shadows[entry].next
    learner.shadows[entry].next = totals.free_entry
    totals.free_entry = entry + 1


@called
def _touch(learner: Learner, order: int, entry: int, group: int, grows: bool) -> None:
    """Make the entry the newest of its group; into a full shadow it comes in exchange for another one."""
    place = learner.places[order, entry]
    if place.group != 0:
        _unlink(learner, order, entry)
        learner.picks[order].end = 0
    elif not grows:
        goes = _first_to_go(learner, order)
        _unlink(learner, order, goes)
        learner.places[order, goes].group = 0
        _drop_if_unused(learner, goes)
    _append(learner, order, entry, group)


@inlined
def _append(learner: Learner, order: int, entry: int, group: int) -> None:
    place, end = learner.places[order, entry], learner.ends[order, group]
    place.group = group + 1
    place.older = end.newest
    place.newer = 0
    if order == TURNS and (end.newest == 0 or not _is_held(learner, end.newest - 1)):
        end.free = end.newest
    if end.newest != 0:
        learner.places[order, end.newest - 1].newer = entry + 1
    else:
        end.oldest = entry + 1
    end.newest = entry + 1


@inlined
def draw_again(learner: Learner) -> None:
    """Let the share of the requests that lives long be that of the new times to live."""
    for kind in range(CLASSES):
        short, long = learner.ends[EXPIRY, 2 * kind].oldest - 1, learner.ends[EXPIRY, 2 * kind + 1].oldest - 1
        for group in (2 * kind, 2 * kind + 1):
            learner.ends[EXPIRY, group].oldest = learner.ends[EXPIRY, group].newest = 0
        while short >= 0 or long >= 0:
            is_short = long < 0 or (short >= 0 and learner.shadows[short].access < learner.shadows[long].access)
            entry = short if is_short else long
            newer = learner.places[EXPIRY, entry].newer - 1
            if is_short:
                short = newer
            else:
                long = newer
            is_long = draws_long(learner, learner.shadows[entry].released)
            _append(learner, EXPIRY, entry, 2 * kind + (1 if is_long else 0))


@inlined
def _unlink(learner: Learner, order: int, entry: int) -> None:
    place = learner.places[order, entry]
    older, newer = place.older, place.newer
    if learner.ends[order, place.group - 1].free == entry + 1:
        learner.ends[order, place.group - 1].free = older
    if older != 0:
        learner.places[order, older - 1].newer = newer
    else:
        learner.ends[order, place.group - 1].oldest = newer
    if newer != 0:
        learner.places[order, newer - 1].older = older
    else:
        learner.ends[order, place.group - 1].newest = older


@called
def _first_to_go(learner: Learner, order: int) -> int:
    """Return the entry of a full shadow that its order would evict.

    A request evicts many, and they go session by session: at the end of the group from which one went, the next one
    goes, too, if its score is the same. For no other candidate comes or goes, but by a hit.
    """
    if order == RECENCY:
        return learner.ends[RECENCY, 0].oldest - 1
    pick = learner.picks[order]
    if pick.end != 0:
        entry = _entry_at(learner, order, pick.end)
        if entry >= 0 and not _is_held(learner, entry) and _score(learner, order, entry) == pick.score:
            return entry
    return _first_to_expire(learner) if order == EXPIRY else _first_by_turns(learner)


@inlined
def _entry_at(learner: Learner, order: int, end: int) -> int:
    """Return the entry that goes from an end of a group, or -1."""
    group = (end - 1) >> 1
    oldest = learner.ends[order, group].oldest - 1
    is_newest = (end - 1) & 1 != 0
    return _newest_not_held(learner, group) if is_newest and oldest >= 0 and not _is_held(learner, oldest) else oldest


@inlined
def _score(learner: Learner, order: int, entry: int) -> Any:
    return _turn_score(learner, entry) if order == TURNS else _expiry_score(learner, entry)


@inlined
def _pick(learner: Learner, order: int, end: int, score: Any) -> None:
    """Remember from which end of which group an entry goes, and at which score."""
    pick = learner.picks[order]
    pick.end, pick.score = end, score


@inlined
def _first_to_expire(learner: Learner) -> int:
    chosen, lowest, end = -1, np.int64(0), 0
    for group in range(2 * CLASSES):
        entry = learner.ends[EXPIRY, group].oldest - 1
        if entry >= 0:
            score = _expiry_score(learner, entry)
            if _is_held(learner, entry):
                score += HELD
            if chosen < 0 or score < lowest:
                chosen, lowest, end = entry, score, 1 + 2 * group
    _pick(learner, EXPIRY, end, lowest)
    return chosen


@inlined
def _expiry_score(learner: Learner, entry: int) -> Any:
    group = learner.places[EXPIRY, entry].group - 1
    lives = learner.classes[group >> 1]
    return learner.shadows[entry].released + (lives.long if group & 1 else lives.short)


@inlined
def _first_by_turns(learner: Learner) -> int:
    """Return what goes by turns: of each group that is its oldest entry or its newest one."""
    oldest = learner.ends[TURNS, FIRST_TURNS].oldest - 1
    if oldest >= 0 and not _is_held(learner, oldest):
        return oldest
    chosen, lowest, end = -1, np.int64(0), 0
    for group in range(GROUPS - 2, -1, -1):
        oldest = learner.ends[TURNS, group].oldest - 1
        if oldest < 0 or _is_held(learner, oldest):
            continue
        if chosen < 0 or lengths_below(group) >= -lowest:
            newest = _newest_not_held(learner, group)
            score = _turn_score(learner, newest)
            if chosen < 0 or score <= lowest:
                chosen, lowest, end = newest, score, 2 + 2 * group
        score = _turn_score(learner, oldest)
        if score <= lowest:
            chosen, lowest, end = oldest, score, 1 + 2 * group
    _pick(learner, TURNS, end, lowest)
    return chosen if chosen >= 0 else _first_of_held(learner)


@inlined
def _newest_not_held(learner: Learner, group: int) -> int:
    """Return the newest entry of a group whose oldest one is not held."""
    end = learner.ends[TURNS, group]
    newest = end.newest - 1
    return end.free - 1 if _is_held(learner, newest) else newest


@inlined
def _first_of_held(learner: Learner) -> int:
    """Return what goes by turns where the present request has used all there is."""
    chosen, lowest = -1, np.int64(0)
    for group in range(GROUPS):
        oldest = learner.ends[TURNS, group].oldest - 1
        if oldest >= 0:
            score = _turn_score(learner, oldest)
            if chosen < 0 or score < lowest:
                chosen, lowest = oldest, score
    return chosen


@inlined
def _turn_score(learner: Learner, entry: int) -> Any:
    """Return the score of an entry by turns, now."""
    shadow = learner.shadows[entry]
    return turn_score(learner.totals[0].time, shadow.time, shadow.expected)


@inlined
def _is_held(learner: Learner, entry: int) -> bool:
    """Tell whether the present request has used the entry."""
    return learner.shadows[entry].access >= learner.totals[0].began


# Duels, judged every half capacity of accesses.

# An order takes over when its shadow leads by so many standard deviations and by so much of the accesses; that by turns
# also by so much of the hits of recency, as where that finds much, there is more to lose than to win. It loses when it
# is behind. A lead fades, and counts for little more than what takes over, and that by expiry for at most a share of a
# shadow: when the traffic changes, what was won before is soon used up.
AHEAD = 2.0
BEHIND = 0.5
CLEARLY = 0.002
BETTER = (0.0, 0.0, 0.09)
FADING = 1 / 9  # per capacity of accesses, or so many of them if it is smaller:
SHORTEST_MEMORY = (0, 0, 4000)
MOST_DEVIATIONS = 2.25
MOST_LEAD = 0.2


@inlined
def end_round(learner: Learner) -> None:
    """Add the leads in this request, whose blocks are found together, to those in the duels."""
    totals = learner.totals[0]
    totals.began = totals.accesses + 1
    learner.picks[EXPIRY].end = learner.picks[TURNS].end = 0
    for order in (EXPIRY, TURNS):
        duel = learner.duels[order]
        duel.seen += totals.seen
        duel.found += totals.found
        duel.lead += duel.request_lead
        duel.gain += duel.request_lead
        duel.variance += duel.request_lead * duel.request_lead
        duel.request_lead = 0.0
    totals.seen = totals.found = 0.0


@inlined
def judge(learner: Learner, elapsed: int, num_blocks: int) -> None:
    """Let the order rule whose shadow had more hits lately; so many accesses went by since the last judgement."""
    totals = learner.totals[0]
    for order in (EXPIRY, TURNS):
        _decide(learner, order)
    expiry, turns = learner.duels[EXPIRY], learner.duels[TURNS]
    if turns.is_won != 0 and (expiry.is_won == 0 or turns.gain > expiry.gain):
        totals.rules = TURNS
    else:
        totals.rules = EXPIRY if expiry.is_won != 0 else RECENCY
    for order in (EXPIRY, TURNS):
        _fade(learner, order, _kept(elapsed, max(num_blocks, SHORTEST_MEMORY[order])))
        learner.duels[order].gain *= _kept(elapsed, max(num_blocks, SHORTEST_MEMORY[TURNS]))


@inlined
def _kept(elapsed: int, memory: int) -> float:
    """Return which share of what was seen before counts after so many accesses."""
    return 1.0 / (1.0 + FADING * (elapsed / memory))


@inlined
def _least(learner: Learner, order: int) -> float:
    """Return by how much an order must lead, chance left out."""
    return CLEARLY * learner.duels[order].seen + BETTER[order] * learner.duels[order].found


@inlined
def _decide(learner: Learner, order: int) -> None:
    """Tell whether this order is ahead of recency."""
    duel = learner.duels[order]
    deviation = duel.variance**0.5
    if duel.lead > _least(learner, order) + AHEAD * deviation:
        duel.is_won = 1
    elif duel.lead < BETTER[order] * duel.found - BEHIND * deviation:
        duel.is_won = 0


@inlined
def _fade(learner: Learner, order: int, kept: float) -> None:
    totals, duel = learner.totals[0], learner.duels[order]
    most = _least(learner, order) + MOST_DEVIATIONS * duel.variance**0.5
    if order == EXPIRY:
        most = min(most, MOST_LEAD * totals.room)
    duel.seen *= kept
    duel.found *= kept
    duel.variance *= kept * kept
    duel.lead = min(most, max(-most, duel.lead * kept))
