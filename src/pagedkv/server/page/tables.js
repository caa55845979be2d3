// The tables of requests and of prefixes. Texts go in as text, never as markup.

const REQUESTS = [
  ["Request", (r) => r.request_id], ["State", (r) => r.state], ["Prompt", (r) => r.prompt_tokens.toLocaleString("en")],
  ["Cached", (r) => r.cached_tokens.toLocaleString("en")], ["Written", (r) => r.output_tokens.toLocaleString("en")],
  ["Blocks", (r) => r.blocks.toLocaleString("en")], ["Age", (r) => seconds(r.age)],
];
const PREFIXES = [
  ["Ends at block", (p) => `${p.block_id}`], ["Tokens", (p) => p.num_tokens.toLocaleString("en")],
  ["Uses", (p) => p.uses.toLocaleString("en")], ["Held by", (p) => `${p.ref_count}`],
];
const MOST_ROWS = 200;

export const seconds = (value) => value < 10 ? `${value.toFixed(1)} s` : value < 120 ? `${Math.round(value)} s` : `${Math.round(value / 60)} min`;

/** When a block was used that is so many ticks old: the clock holds (tick, seconds ago), the oldest first. */
export function lastUse({ clock, tick }, age) {
  const when = tick - age, place = clock.findIndex(([each]) => each >= when);
  if (!clock.length) return age ? `last used ${age.toLocaleString("en")} ticks ago` : "used right now";
  const [late, lateSeconds] = clock.at(place), [early, earlySeconds] = clock[Math.max(0, place - 1)];
  const share = place > 0 ? (when - early) / (late - early) : 1;
  return `last used ${seconds(earlySeconds + share * (lateSeconds - earlySeconds))} ago`;
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** A table whose rows are kept and only their words changed, so that nothing flickers and the focus stays. */
class Table {
  constructor(table, columns, empty) {
    Object.assign(this, { columns, empty, rows: [] });
    const head = table.createTHead().insertRow();
    for (const [title] of columns) head.append(element("th", title, { scope: "col" }));
    this.body = table.createTBody();
  }

  fill(records) {
    const shown = records.slice(0, MOST_ROWS);
    while (this.body.rows.length > shown.length) this.body.deleteRow(-1);
    shown.forEach((record, place) => {
      const row = this.body.rows[place]?.dataset.row ? this.body.rows[place] : this.newRow(place);
      this.columns.forEach(([, read], i) => {
        const text = read(record);
        if (row.cells[i].textContent !== text) {
          row.cells[i].textContent = text;
          if (!i) row.cells[i].title = text;
        }
      });
    });
    if (!shown.length) {
      this.body.insertRow().append(element("td", this.empty, { class: "none", colspan: this.columns.length }));
    } else if (records.length > shown.length) {
      const text = `and ${(records.length - shown.length).toLocaleString("en")} more`;
      this.body.insertRow().append(element("td", text, { class: "none", colspan: this.columns.length }));
    }
  }

  newRow(place) {
    if (this.body.rows[place]) this.body.deleteRow(place);
    const row = this.body.insertRow(place);
    row.dataset.row = place;
    this.columns.forEach(([title], i) => row.append(element(i ? "td" : "th", "", i ? { "data-label": title } : { scope: "row" })));
    return row;
  }
}

export const requestTable = (table) => new Table(table, REQUESTS, "Nobody asks for anything right now.");
export const prefixTable = (table) => new Table(table, PREFIXES, "No prefix has been used twice yet.");
