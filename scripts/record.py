"""Record docs/images/demo.svg and docs/images/chat.svg: what a terminal shows of real runs, as animated pictures.

python scripts/record.py demo [FILE]
python scripts/record.py chat [FILE]      with the model of scripts/fetch_chat_model.py

A shell is run on a terminal of its own, a script types into it, and what comes back goes through a terminal emulator
(pyte). A row of the screen is drawn once for each text that it showed, and is visible for as long as it did. Pauses are
cut to a second and a half, nothing else; a reader without animation sees the last screen.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pyte

ROOT = Path(__file__).parents[1]
PAUSE, FRAME, LAST = 1.5, 0.1, 6.0  # seconds: longest pause, shortest frame, the last screen
WIDTH, HEIGHT, SIZE = 8.4, 18, 14  # of a cell and of its letters, in pixels
GROUND, INK = "#16181d", "#d5d8de"
COLORS = {
    "black": "#2b2f38", "red": "#e06c75", "green": "#8cc570", "brown": "#e0c06c", "blue": "#6aa6f0",
    "magenta": "#d27ee0", "cyan": "#5bc0cf", "white": "#d5d8de", "brightblack": "#7c8391", "brightred": "#ef8b93",
    "brightgreen": "#a5d98b", "brightbrown": "#f0d58b", "brightblue": "#8bbcf7", "brightmagenta": "#e29eed",
    "brightcyan": "#83d5e1", "brightwhite": "#ffffff",
}  # fmt: skip

BRIEF = """\
You are a helpful assistant who knows geography well. You answer each question in one short sentence, in plain \
English. You never apologise, you make no lists, and you do not explain more than you were asked. If you do \
not know something, you say so. If a question is not clear, you say what you think was meant, and answer that. \
Names of places are written as English writes them."""

Run = tuple[int, str, str, bool]  # column, text, color, bold
Row = tuple[Run, ...]


@dataclass(frozen=True)
class Scene:
    """What is typed into a shell: each text after the shell, or the program, has asked for it."""

    title: str
    columns: int
    rows: int
    lines: tuple[tuple[str, str], ...]  # what to wait for, what to type


DEMO = Scene("make demo", 118, 49, ((r"\$ $", "pagedkv demo\r"), (r"free[^$]*\$ $", "")))
CHAT = Scene(
    "pagedkv chat",
    98,
    34,
    (
        (
            r"\$ $",
            'pagedkv chat SmolLM2-135M-Instruct --temperature 0 --max-new-tokens 40 --system "$(cat brief.txt)"\r',
        ),
        (r">>> $", "What is the capital of France?\r"),
        (r">>> $", "And of Italy?\r"),
        (r">>> $", "/new\r"),
        (r">>> $", "What is the capital of Japan?\r"),
        (r">>> $", "/stats\r"),
        (r">>> $", "/quit\r"),
        (r"\$ $", "pagedkv chat SmolLM2-135M-Instruct --continue --temperature 0\r"),
        (r">>> $", "And of Spain?\r"),
        (r">>> $", ""),
    ),
)
SCENES = {"demo": DEMO, "chat": CHAT}


def main() -> None:
    """Record a scene."""
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "images" / f"{name}.svg"
    scene = SCENES[name]
    with tempfile.TemporaryDirectory() as folder:
        events = perform(scene, Path(folder), name)
    target.parent.mkdir(exist_ok=True)
    target.write_text(draw(scene, frames(scene, events)))
    print(f"{target}: {target.stat().st_size / 1e3:,.0f} kB")


# The run.


def perform(scene: Scene, folder: Path, name: str) -> list[tuple[float, bytes]]:
    """Run the scene in a shell and return what it wrote, and when."""
    command = folder / "bin" / "pagedkv"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from pagedkv.cli import main; main()' \"$@\"\n")
    command.chmod(0o755)
    if name == "chat":
        fetch = [sys.executable, str(ROOT / "scripts" / "fetch_chat_model.py")]
        model = Path(subprocess.run(fetch, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
        (folder / model.name).symlink_to(model)
        (folder / "brief.txt").write_text(BRIEF)
    environment = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "PAGEDKV_SESSIONS": str(folder / "chats"),
        "PS1": "$ ",
        "TERM": "xterm-256color",
        "BASH_SILENCE_DEPRECATION_WARNING": "1",
    }
    environment.pop("COLORTERM", None)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", scene.rows, scene.columns, 0, 0))
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile"], stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    events: list[tuple[float, bytes]] = []
    try:
        start = 0
        for wanted, typed in scene.lines:
            _read_until(master, events, start, wanted)
            for letter in typed:
                start = len(events)  # before the answer, which may come with the last letter
                os.write(master, letter.encode())
                time.sleep(0.03)
                _read(master, events)
    finally:
        shell.kill()
        os.close(master)
    return events


def _read_until(master: int, events: list[tuple[float, bytes]], start: int, wanted: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        text = b"".join(data for _, data in events[start:]).decode(errors="replace")
        if re.search(wanted, re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text)):
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"{wanted!r} never came: {text[-2000:]}")
        _read(master, events)


def _read(master: int, events: list[tuple[float, bytes]]) -> None:
    while select.select([master], [], [], 0.02)[0]:
        events.append((time.monotonic(), os.read(master, 65536)))


# What the screen showed.


def frames(scene: Scene, events: list[tuple[float, bytes]]) -> list[tuple[float, list[Row]]]:
    """Return the screens, and when each began; pauses are cut, what comes at once is one screen."""
    screen = pyte.Screen(scene.columns, scene.rows)
    stream = pyte.ByteStream(screen)
    found: list[tuple[float, list[Row]]] = []
    now, before = 0.0, events[0][0]
    for place, (when, data) in enumerate(events):
        now += min(when - before, PAUSE)
        before = when
        stream.feed(_visible_dim(data))
        is_last = place + 1 == len(events)
        if not is_last and events[place + 1][0] - when < FRAME and found and now - found[-1][0] < FRAME:
            continue
        rows = [_row(screen, number) for number in range(scene.rows)]
        if not found or rows != found[-1][1]:
            found.append((now, rows))
    return found


def _visible_dim(data: bytes) -> bytes:
    """Write dim text in grey: the emulator knows no dim."""
    return re.sub(rb"\x1b\[2m", b"\x1b[90m", re.sub(rb"\x1b\[(\d+;)*2(;\d+)*m", b"\x1b[90m", data))


def _row(screen: pyte.Screen, number: int) -> Row:
    runs: list[Run] = []
    for column in range(screen.columns):
        cell = screen.buffer[number][column]
        color = INK if cell.fg == "default" else COLORS.get(cell.fg, f"#{cell.fg}")
        if runs and runs[-1][2:] == (color, cell.bold) and runs[-1][0] + len(runs[-1][1]) == column:
            at, text, *_ = runs.pop()
            runs.append((at, text + cell.data, color, cell.bold))
        elif cell.data != " ":
            runs.append((column, cell.data, color, cell.bold))
    return tuple((at, text.rstrip(), color, bold) for at, text, color, bold in runs)


# The picture.


def draw(scene: Scene, found: list[tuple[float, list[Row]]]) -> str:
    """Return the screens as one SVG, whose rows are seen when they were."""
    total = found[-1][0] + LAST
    width, height = scene.columns * WIDTH + 24, scene.rows * HEIGHT + 52
    styles = {
        key: f"s{number}"
        for number, key in enumerate(sorted({run[2:] for _, rows in found for row in rows for run in row}))
    }
    css = "".join(
        f".{name}{{fill:{color}{';font-weight:bold' if bold else ''}}}" for (color, bold), name in styles.items()
    )
    body = []
    for number in range(scene.rows):
        for row, begin, end in _spans([(when, rows[number]) for when, rows in found], total):
            body.append(_drawn_row(row, number, begin / total, end / total, total, styles))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-size="{SIZE}" '
        f'font-family="ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace">\n'
        f"<style>text{{white-space:pre}}{css}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="{GROUND}"/>'
        + "".join(
            f'<circle cx="{20 + 18 * i}" cy="18" r="5" fill="{c}"/>'
            for i, c in enumerate(("#e06c75", "#e0c06c", "#8cc570"))
        )
        + f'<text x="50%" y="23" text-anchor="middle" fill="#7c8391">{escape(scene.title)}</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _spans(rows: list[tuple[float, Row]], total: float) -> Iterator[tuple[Row, float, float]]:
    """Yield each text of a row with the time in which it was there."""
    begun, shown = rows[0]
    for when, row in [*rows[1:], (total, ())]:
        if row != shown or when == total:
            if shown:
                yield shown, begun, when
            begun, shown = when, row


def _drawn_row(
    row: Row, number: int, begin: float, end: float, total: float, styles: dict[tuple[str, bool], str]
) -> str:
    y = 52 + number * HEIGHT
    texts = "".join(
        f'<text class="{styles[color, bold]}" x="{12 + at * WIDTH:g}" y="{y}" textLength="{len(text) * WIDTH:g}">'
        f"{escape(text)}</text>"
        for at, text, color, bold in row
    )
    if begin == 0 and end == 1:
        return texts
    values = ["hidden"] * (begin > 0) + ["visible"] + ["hidden"] * (end < 1)
    times = ["0"] * (begin > 0) + [f"{begin:.5g}"] + [f"{end:.5g}"] * (end < 1)
    animate = (
        f'<animate attributeName="visibility" values="{";".join(values)}" keyTimes="{";".join(times)}" '
        f'dur="{total:.2f}s" calcMode="discrete" repeatCount="indefinite"/>'
    )
    return f'<g visibility="{"visible" if end == 1 else "hidden"}">{animate}{texts}</g>'


if __name__ == "__main__":
    main()
