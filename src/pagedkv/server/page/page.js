// Snapshots come in, the page is drawn from the latest one, once a frame at most.

import { makeCharts } from "./charts.js";
import { BlockMap, KINDS } from "./map.js";
import { Watch } from "./stream.js";
import { lastUse, prefixTable, requestTable } from "./tables.js";
import { Tiers } from "./tiers.js";

const find = (id) => document.getElementById(id);
const map = new BlockMap(find("map"));
const charts = makeCharts(document);
const requests = requestTable(find("requests"));
const prefixes = prefixTable(find("prefixes"));
const tiers = new Tiers(find("tiers"));
const MOST_HOLDERS = 4;
const number = (value) => value.toLocaleString("en");
let pointedRow = null, latest = null, isPaused = false, isFresh = false, isDue = false, walksByKeys = false;

const legend = Object.fromEntries(KINDS.map((kind) => {
  const item = document.createElement("li"), swatch = document.createElement("span"), count = document.createElement("b");
  swatch.className = `swatch ${kind}`;
  item.append(swatch, kind, count);
  find("legend").append(item);
  return [kind, count];
}));

function show(snapshot) {
  if (isPaused) return;
  if (snapshot.blocks) map.blocks = snapshot.blocks;
  for (const chart of charts) chart.add(snapshot, latest);
  tiers.add(snapshot);
  latest = snapshot;
  isFresh = true;
  drawSoon();
}

function drawSoon() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    const started = performance.now();
    draw();
    const took = performance.now() - started;
    find("drawn").textContent = latest ? `${number(map.count)} blocks drawn in ${took.toFixed(1)} ms` : "";
    find("drawn").dataset.milliseconds = took;
  });
}

/** Whose blocks stand out: the request of the row that is pointed at, or the owner of the block. */
function ownerInSight() {
  if (pointedRow !== null) return pointedRow;
  return map.cursor >= 0 ? latest.requests[map.blocks.owners[map.cursor]]?.request_id ?? null : null;
}

function draw() {
  if (!latest || !map.blocks) return;
  const owner = ownerInSight();
  map.near = map.blocks.tables[owner] ?? null;
  map.draw();
  const style = getComputedStyle(document.documentElement);
  const colours = Object.fromEntries(["line", "fill", "rule", "other"].map((name) => [name, style.getPropertyValue(`--${name}`)]));
  for (const chart of charts) chart.draw(colours);
  // What only a new snapshot changes is left alone while the pointer moves.
  if (isFresh) tell();
  isFresh = false;
  for (const row of requests.body.rows) row.classList.toggle("near", owner !== null && row.cells[0].textContent === owner);
  describe();
}

function tell() {
  const counts = new Uint32Array(KINDS.length);
  for (const kind of map.blocks.kinds) counts[kind] += 1;
  KINDS.forEach((kind, i) => { legend[kind].textContent = number(counts[i]); });
  find("about").textContent = `${latest.model} · strategy ${latest.strategy}`;
  find("pool-size").textContent = `${number(latest.num_blocks)} of ${number(latest.block_size)} tokens`;
  map.canvas.setAttribute("aria-label", `Block map: ${KINDS.map((kind, i) => `${counts[i]} ${kind}`).join(", ")}`);
  tiers.draw();
  requests.fill(latest.requests);
  prefixes.fill(latest.prefixes);
}

/** Who holds a block, as many as a line can name. */
function holders(block) {
  const ids = Object.keys(map.blocks.tables).filter((id) => map.blocks.tables[id].includes(block));
  const named = ids.slice(0, MOST_HOLDERS).join(", ");
  return ids.length > MOST_HOLDERS ? `${named} and ${ids.length - MOST_HOLDERS} more` : named;
}

function describe() {
  const block = map.cursor, line = find("cell");
  if (block < 0 || block >= map.count) { line.textContent = ""; return; }
  const { kinds, refCounts, depths, ages } = map.blocks;
  const kind = KINDS[kinds[block]], count = refCounts[block];
  const said = [count > 1 ? `${kind === "shared" ? "shared" : `${kind}, held`} by ${number(count)}: ${holders(block)}` : kind];
  if (count === 1) said.push(`held by ${holders(block)}`);
  if (kind !== "free") {
    said.push(`depth ${depths[block]}`, lastUse(latest, ages[block]));
  }
  const name = Object.assign(document.createElement("b"), { textContent: `Block ${block}` });
  const text = `: ${said.join(", ")}`;
  // Written only when it changed: a screen reader speaks every change.
  if (line.textContent !== name.textContent + text) line.replaceChildren(name, text);
}

function point(block) {
  if (block === map.cursor) return;
  map.cursor = block;
  drawSoon();
}

map.canvas.addEventListener("pointermove", (event) => { walksByKeys = false; point(map.at(event.clientX, event.clientY)); });
map.canvas.addEventListener("pointerleave", () => { if (!walksByKeys) point(-1); });
map.canvas.addEventListener("blur", () => point(-1));
map.canvas.addEventListener("keydown", (event) => {
  const block = map.after(event.key);
  if (block < 0) return;
  event.preventDefault();
  walksByKeys = true;
  point(block);
});
find("requests").addEventListener("pointerover", (event) => {
  const row = event.target.closest("tbody tr");
  pointedRow = row?.dataset.row ? row.cells[0].textContent : null;
  drawSoon();
});
find("requests").addEventListener("pointerleave", () => { pointedRow = null; drawSoon(); });
find("shade").addEventListener("change", (event) => { map.shade = event.target.value; drawSoon(); });
window.addEventListener("resize", drawSoon);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { map.readColours(); drawSoon(); });

const watch = new Watch("v1/cache/stream", {
  onSnapshot: show,
  onState: (state, words) => {
    const status = find("status");
    if (isPaused || (status.dataset.state === state && status.textContent === words)) return;
    status.dataset.state = state;
    status.textContent = words;
  },
  onKeyWanted: (refusal) => { find("ask").hidden = false; find("refusal").textContent = refusal; find("key").focus(); },
});

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  watch.key = find("key").value.trim();
  find("ask").hidden = true;
  watch.start();
});

function pause(wanted) {
  isPaused = wanted;
  find("pause").setAttribute("aria-pressed", wanted);
  if (wanted) { watch.stop(); find("status").dataset.state = "waiting"; find("status").textContent = "paused"; } else watch.start();
}

find("pause").addEventListener("click", () => pause(!isPaused));
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest?.("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey;
  if (!isTyping && event.key.toLowerCase() === "p") pause(!isPaused);
});
// Nobody looks at a hidden page: the server takes no snapshots for it.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) watch.stop(); else if (!isPaused && find("ask").hidden) watch.start();
});
watch.start();
