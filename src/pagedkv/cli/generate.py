"""``pagedkv generate``: a model writes text, and its keys and values live in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from pagedkv.cli.block_map import BlockMap
from pagedkv.cli.console import library_notices, notes
from pagedkv.cli.loading import LoadedModel, check_folder, load_model
from pagedkv.cli.machine import physical_memory
from pagedkv.cli.report import BlockUse, GenerateReport, MemoryUse, print_json, print_table
from pagedkv.cli.request import GenerateRequest
from pagedkv.cli.screen import Screen
from pagedkv.cli.streamer import TextPieces
from pagedkv.cli.terminal import Failure
from pagedkv.cli.threads import threads_for

if TYPE_CHECKING:
    from pagedkv.cli.writing import Written

__all__ = ["run"]


def run(request: GenerateRequest) -> None:
    """Do what was asked for: text to stdout as it comes, then the figures.

    Raises
    ------
    Failure
        The request cannot be met; the text says what to change.
    """
    _check_strategy(request)
    check_folder(request.model_path)
    prompt = request.read_prompt()
    console = notes()
    with library_notices(console):
        with console.status("loading the model"):
            loaded = load_model(request.model_path, request.device)
            from pagedkv.cli import writing
        ids = loaded.encode(prompt)
        _check_length(request, loaded, len(ids))
        _check_memory(request, loaded, len(ids))
        doing = f"searching with {request.beams} beams" if request.beams > 1 else "reading the prompt"
        prefix = prompt if request.echo else ""
        screen = Screen(prefix, request.samples, console.status(doing), silent=request.json)
        with threads_for(loaded.model), screen:
            write = writing.write_endlessly if request.stream else writing.write
            written = write(request, loaded, ids, screen.show)
            texts = [_text(loaded, row, written.stop_tokens) for row in written.token_ids]
            screen.finish(texts)
    _tell(request, _report(request, prompt, len(ids), texts, written), written, console)


def _check_strategy(request: GenerateRequest) -> None:
    from pagedkv import InvalidOperation, parse_strategy

    try:
        parse_strategy(request.strategy)
    except InvalidOperation as error:
        raise Failure(f"--{error.reason}") from None


def _check_length(request: GenerateRequest, loaded: LoadedModel, prompt_tokens: int) -> None:
    limit = loaded.max_positions
    if limit is None:
        return
    if request.stream:
        if request.sinks + request.window >= limit:
            raise Failure(
                f"--sink-tokens and --window-tokens expect less than the model's {limit} positions together, "
                f"got {request.sinks + request.window}"
            )
    elif prompt_tokens + (request.token_limit or 0) > limit:
        raise Failure(
            f"the prompt of {prompt_tokens} tokens and {request.token_limit} new ones exceed the model's {limit} "
            f"positions: lower --max-new-tokens, or use --stream"
        )


def _check_memory(request: GenerateRequest, loaded: LoadedModel, prompt_tokens: int) -> None:
    """Refuse a pool beyond all memory: the system would grant it, and end the process when it is used."""
    blocks = request.pool_size(prompt_tokens)
    needed = blocks * request.block_size * loaded.bytes_per_token(request.kv_dtype)
    available = physical_memory()
    if available is not None and needed > available and loaded.model.device.type == "cpu":
        raise Failure(
            f"a pool of {blocks} blocks of {request.block_size} tokens takes {needed / 1e9:,.1f} GB, this machine has "
            f"{available / 1e9:,.1f}: lower --num-blocks, -n or --max-new-tokens"
        )


def _text(loaded: LoadedModel, row: list[int], stop_tokens: frozenset[int]) -> str:
    """Decode as the streamer does, so that what was shown and what is reported are the same."""
    pieces = TextPieces(loaded.tokenizer.decode)
    kept = row[:-1] if row and row[-1] in stop_tokens else row
    return "".join(map(pieces.add, kept)) + pieces.flush()


def _report(
    request: GenerateRequest, prompt: str, prompt_tokens: int, texts: list[str], written: Written
) -> GenerateReport:
    snapshot = written.snapshot
    refs = snapshot.ref_count
    new_tokens = sum(map(len, written.token_ids))
    longest = prompt_tokens + (request.token_limit or new_tokens)
    return GenerateReport(
        model=str(request.model_path),
        prompt=prompt,
        seed=request.seed,
        texts=texts,
        token_ids=written.token_ids,
        prompt_tokens=prompt_tokens,
        cached_tokens=written.cached_tokens,
        new_tokens=new_tokens,
        dropped_tokens=written.dropped_tokens,
        blocks=BlockUse(
            used=int((refs > 0).sum()),
            shared=int((refs > 1).sum()),
            copied=snapshot.stats.blocks_copied,
            cached=int(snapshot.cached.sum()),
            peak=snapshot.stats.peak_blocks_used,
            total=snapshot.total_blocks,
            block_size=snapshot.block_size,
        ),
        memory=MemoryUse(
            paged=snapshot.stats.peak_blocks_used * written.block_bytes,
            contiguous=request.rows * longest * written.block_bytes // snapshot.block_size,
        ),
        seconds=written.seconds,
        tokens_per_second=new_tokens / written.seconds if written.seconds else 0.0,
    )


def _tell(request: GenerateRequest, report: GenerateReport, written: Written, console: Console) -> None:
    if request.json:
        print_json(report)
    else:
        console.print()
        print_table(report, console)
    if request.show_blocks:
        console.print()
        console.print(BlockMap(written.snapshot))
