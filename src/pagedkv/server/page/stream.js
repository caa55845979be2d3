// Server-sent events over fetch: unlike EventSource it can send a key, which stays in memory.

const FIRST_PAUSE = 500, LONGEST_PAUSE = 8000;

/** Why a stream cannot be had: the status of HTTP, and what the server says. */
export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

async function inflate(base64, numBlocks, requests) {
  const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = await new Response(stream).arrayBuffer();
  let place = 0;
  // Columns need not lie on their own boundaries: slice() copies them to where they may be read.
  const column = (Kind, count = numBlocks) => {
    const size = count * Kind.BYTES_PER_ELEMENT;
    place += size;
    return new Kind(raw.slice(place - size, place));
  };
  const blocks = {
    kinds: column(Uint8Array), refCounts: column(Uint16Array), owners: column(Int32Array),
    depths: column(Uint16Array), ages: column(Uint32Array), tables: {},
  };
  for (const request of requests) blocks.tables[request.request_id] = column(Int32Array, request.blocks);
  return blocks;
}

async function follow(address, key, signal, onSnapshot) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(address, { headers, signal, cache: "no-store" });
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Refused(response.status, body.error?.message ?? response.statusText);
  }
  for await (const snapshot of events(response)) {
    snapshot.blocks = snapshot.columns ? await inflate(snapshot.columns, snapshot.num_blocks, snapshot.requests) : null;
    onSnapshot(snapshot);
  }
}

/** Follows a stream as long as it is wanted, again and again after it was lost. */
export class Watch {
  constructor(address, { onSnapshot, onState, onKeyWanted }) {
    Object.assign(this, { address, onSnapshot, onState, onKeyWanted, key: "", stopper: null });
  }

  stop() { this.stopper?.abort(); this.stopper = null; }

  async start() {
    this.stop();
    const { signal } = (this.stopper = new AbortController());
    let pause = FIRST_PAUSE;
    while (!signal.aborted) {
      try {
        this.onState("waiting", "connecting");
        await follow(this.address, this.key, signal, (snapshot) => {
          if (signal.aborted) return;
          pause = FIRST_PAUSE;
          this.onState("live", "live");
          this.onSnapshot(snapshot);
        });
        if (!signal.aborted) this.onState("lost", "the server ended the stream");
      } catch (error) {
        if (signal.aborted) return;
        if (error.status === 401 || error.status === 403) {
          this.onState("lost", "needs a key");
          this.onKeyWanted(this.key ? error.message : "");
          return;
        }
        this.onState("lost", error instanceof Refused ? error.message : "no connection");
      }
      await new Promise((resolve) => setTimeout(resolve, pause));
      pause = Math.min(2 * pause, LONGEST_PAUSE);
    }
  }
}
