// Tiers as bands under the pool: how full each is, what is read and written, how often it helped.

const SECONDS = 2;

const number = (value) => value.toLocaleString("en");

/** Bytes in binary units, three digits of them. */
function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) { value /= 1024; place += 1; }
  return `${value >= 99.95 ? Math.round(value) : Number(value.toPrecision(3))} ${units[place]}`;
}

const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

export class Tiers {
  constructor(list) { Object.assign(this, { list, seen: [] }); }

  /** Note the counters of a snapshot; rates are over the last seconds. */
  add({ taken, stats }) {
    this.seen.push([taken, stats.tiers]);
    while (this.seen.length > 2 && taken - this.seen[1][0] >= SECONDS) this.seen.shift();
  }

  draw() {
    const [taken, tiers] = this.seen.at(-1), [then, before] = this.seen[0];
    const span = taken - then;
    this.list.hidden = !tiers.length;
    while (this.list.children.length > tiers.length) this.list.lastChild.remove();
    while (this.list.children.length < tiers.length) this.list.append(newBand());
    tiers.forEach((tier, i) => {
      const [name, bar, words] = this.list.children[i].children;
      const rate = (field) => span > 0 && before[i] ? Math.max(0, (tier[field] - before[i][field]) / span) : 0;
      name.textContent = tier.medium;
      bar.hidden = !tier.total_blocks;
      bar.firstChild.style.width = `${tier.total_blocks ? 100 * tier.blocks / tier.total_blocks : 0}%`;
      const said = [
        tier.total_blocks ? `${number(tier.blocks)} of ${number(tier.total_blocks)} blocks` : "blocks not told",
        `reads ${bytes(rate("read_bytes"))}/s`, `writes ${bytes(rate("written_bytes"))}/s`, plural(tier.hits, "hit"),
      ];
      if (tier.corrupt) said.push(`${plural(tier.corrupt, "block")} corrupt`);
      if (tier.failed) said.push(`${plural(tier.failed, "call")} failed`);
      words.textContent = said.join(", ");
    });
  }
}

function newBand() {
  const band = document.createElement("li"), bar = document.createElement("span");
  bar.className = "band";
  bar.ariaHidden = "true";  // the words say the same
  bar.append(document.createElement("span"));
  band.append(document.createElement("b"), bar, document.createElement("span"));
  return band;
}
