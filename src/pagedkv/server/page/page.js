// Snapshots come in, the page is drawn from the latest one, once a frame at most.

import { makeCharts } from "./charts.js";
import { BlockMap, KINDS } from "./map.js";
import { Watch } from "./stream.js";
import { prefixTable, requestTable } from "./tables.js";

const find = (id) => document.getElementById(id);
const map = new BlockMap(find("map"));
const charts = makeCharts(document);
const requests = requestTable(find("requests"));
const prefixes = prefixTable(find("prefixes"));
const number = (value) => value.toLocaleString("en");
let latest = null, isPaused = false, isDue = false, walksByKeys = false;

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
  latest = snapshot;
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

function draw() {
  if (!latest || !map.blocks) return;
  map.draw();
  const style = getComputedStyle(document.documentElement);
  const colours = Object.fromEntries(["line", "fill", "rule", "other"].map((name) => [name, style.getPropertyValue(`--${name}`)]));
  for (const chart of charts) chart.draw(colours);
  const counts = new Uint32Array(KINDS.length);
  for (const kind of map.blocks.kinds) counts[kind] += 1;
  KINDS.forEach((kind, i) => { legend[kind].textContent = number(counts[i]); });
  find("about").textContent = `${latest.model} · strategy ${latest.strategy}`;
  find("pool-size").textContent = `${number(latest.num_blocks)} of ${number(latest.block_size)} tokens`;
  map.canvas.setAttribute("aria-label", `Block map: ${KINDS.map((kind, i) => `${counts[i]} ${kind}`).join(", ")}`);
  requests.fill(latest.requests);
  prefixes.fill(latest.prefixes);
  describe();
}

function describe() {
  const block = map.cursor, line = find("cell");
  if (block < 0 || block >= map.count) { line.textContent = ""; return; }
  const { kinds, refCounts, owners, depths, ages } = map.blocks;
  const kind = KINDS[kinds[block]], owner = latest.requests[owners[block]];
  const said = [kind === "shared" ? `shared by ${refCounts[block]}` : kind];
  if (owner) said.push(`${refCounts[block] > 1 ? "one of them" : "held by"} ${owner.request_id}`);
  if (kind !== "free") {
    said.push(`depth ${depths[block]}`, ages[block] ? `last used ${number(ages[block])} ticks ago` : "used right now");
  }
  const name = Object.assign(document.createElement("b"), { textContent: `Block ${block}` });
  const text = `: ${said.join(", ")}`;
  // Written only when it changed: a screen reader speaks every change.
  if (line.textContent !== name.textContent + text) line.replaceChildren(name, text);
}

function point(block) {
  const owner = block >= 0 && map.blocks ? map.blocks.owners[block] : -1;
  if (block === map.cursor && owner === map.owner) return;
  map.cursor = block;
  map.owner = owner;
  [...requests.body.rows].forEach((row, place) => row.classList.toggle("near", place === owner));
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
  map.owner = row?.dataset.row ? Number(row.dataset.row) : -1;
  drawSoon();
});
find("requests").addEventListener("pointerleave", () => { map.owner = -1; drawSoon(); });
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
  const isTyping = event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey;
  if (!isTyping && event.key.toLowerCase() === "p") pause(!isPaused);
});
// Nobody looks at a hidden page: the server takes no snapshots for it.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) watch.stop(); else if (!isPaused && find("ask").hidden) watch.start();
});
watch.start();
