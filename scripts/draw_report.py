"""Make the report of a plan and its pictures: ``docs/report.png`` for a desk, ``docs/report-phone.png`` for a phone.

Run from the root of the repository, with a Mooncake trace and Chromium at hand::

    python scripts/draw_report.py conversation.jsonl.gz --model llama-3.1-8b
"""

from __future__ import annotations

import argparse
from pathlib import Path

from browser import Browser, is_installed

from pagedkv.sim.model_shape import read_model
from pagedkv.sim.planner import plan
from pagedkv.sim.reading import read_trace
from pagedkv.sim.report import plan_report

PICTURES = (("report.png", 1280, 2080, 1.0, False), ("report-phone.png", 390, 1560, 1.5, True))
"""File, width and height in CSS pixels, pixels per CSS pixel, by night."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", default="llama-3.1-8b", help="a preset, or a Hugging Face model's folder or config")
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--html", type=Path, default=Path("report.html"), help="where the report itself goes")
    parser.add_argument("--pictures", type=Path, default=Path("docs"), help="folder of the pictures")
    options = parser.parse_args()

    trace = read_trace(options.trace)
    made = plan(trace, read_model(options.model), target=options.target)
    command = (
        f"pagedkv plan {options.trace.name} --model {options.model} --target {options.target:g} --html report.html"
    )
    options.html.write_text(plan_report(made, trace, command=command), encoding="utf-8")
    print(f"{options.html}: {options.html.stat().st_size:,} bytes")
    if not is_installed():
        raise SystemExit("no pictures: chromium and chromedriver are not installed")
    with Browser(1280) as window:
        for name, width, height, scale, is_dark in PICTURES:
            window.show_as(width, is_dark=is_dark)
            window.open(options.html)
            picture = window.screenshot(height, scale)
            (options.pictures / name).write_bytes(picture)
            print(f"{options.pictures / name}: {len(picture):,} bytes")


if __name__ == "__main__":
    main()
