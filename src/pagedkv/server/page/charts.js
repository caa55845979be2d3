// Small charts of the last two minutes.

const SHORTEST_SPAN = 30, SPAN = 120;  // seconds
const MOST = 1200; // points

class Chart {
  constructor(figure, { read, write, ceiling = null, second = null }) {
    Object.assign(this, { read, write, ceiling, second, points: [] });
    this.canvas = figure.querySelector("canvas");
    this.output = figure.querySelector("output");
    this.name = figure.querySelector("figcaption").textContent;
  }

  add(now, before) {
    const value = this.read(now, before);
    if (value === null) return;
    this.points.push([now.taken, value, this.second ? this.second(now, before) : null]);
    while (this.points.length > MOST || now.taken - this.points[0][0] > SPAN) this.points.shift();
    const [figure, unit] = this.write(value, now);
    this.output.replaceChildren(figure, Object.assign(document.createElement("small"), { textContent: unit ? ` ${unit}` : "" }));
    this.canvas.setAttribute("aria-label", `${this.name}: ${figure} ${unit}; highest in two minutes ${this.write(this.top(), now)[0]}`);
  }

  top() { return this.points.reduce((most, point) => Math.max(most, point[1]), 0); }

  draw(colours) {
    const { canvas, points } = this;
    const scale = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
    if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.strokeStyle = colours.rule;
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(0, height - 0.5);
    pen.lineTo(width, height - 0.5);
    pen.stroke();
    if (!points.length) return;
    const end = points[points.length - 1][0];
    const top = this.ceiling ?? Math.max(1e-9, ...points.map((point) => Math.max(point[1], point[2] ?? 0)));
    const span = Math.max(SHORTEST_SPAN, end - points[0][0]);
    const x = (time) => width - ((end - time) / span) * width;
    const y = (value) => height - 1 - (Math.min(value, top) / top) * (height - 4);
    const trace = (column) => {
      pen.beginPath();
      points.forEach((point, i) => pen[i ? "lineTo" : "moveTo"](x(point[0]), y(point[column])));
    };
    trace(1);
    pen.strokeStyle = colours.line;
    pen.lineWidth = 1.75;
    pen.lineJoin = "round";
    pen.stroke();
    pen.lineTo(x(end), height);
    pen.lineTo(x(points[0][0]), height);
    pen.fillStyle = colours.fill;
    pen.fill();
    if (!this.second) return;
    trace(2);
    pen.strokeStyle = colours.other;
    pen.lineWidth = 1.25;
    pen.stroke();
  }
}

/** A rate over the last seconds instead of between two snapshots, which would jump with every step of the engine. */
function smooth(field, seconds = 2) {
  const seen = [];
  return (now) => {
    seen.push([now.taken, now.stats[field]]);
    while (seen.length > 2 && now.taken - seen[1][0] >= seconds) seen.shift();
    const span = now.taken - seen[0][0];
    return span > 0 ? Math.max(0, (now.stats[field] - seen[0][1]) / span) : null;
  };
}

const short = (value) => value >= 10000 ? `${(value / 1000).toFixed(1)}k` : value >= 100 || Number.isInteger(value) ? `${Math.round(value)}` : value.toFixed(1);
const percent = (value) => `${(100 * value).toFixed(value && value < 0.1 ? 1 : 0)}%`;

/** Prompt tokens found over those looked up, in the last half minute; of all time until there were some. */
function hitRate() {
  const seen = [];
  return ({ taken, stats }) => {
    seen.push([taken, stats.prefix_queries, stats.prefix_hits]);
    while (seen.length > 2 && taken - seen[1][0] >= 30) seen.shift();
    const [, queries, hits] = seen[0];
    const asked = stats.prefix_queries - queries;
    if (asked > 0) return (stats.prefix_hits - hits) / asked;
    return stats.prefix_queries ? stats.prefix_hits / stats.prefix_queries : 0;
  };
}

export function makeCharts(root) {
  const figure = (name) => root.querySelector(`[data-chart="${name}"]`);
  return [
    new Chart(figure("usage"), {
      read: ({ stats }) => stats.blocks_total ? stats.blocks_used / stats.blocks_total : 0, ceiling: 1,
      write: (value, { stats }) => [percent(value), `of ${stats.blocks_total.toLocaleString("en")}`],
    }),
    new Chart(figure("requests"), {
      read: ({ stats }) => stats.num_running, second: ({ stats }) => stats.num_waiting,
      write: (value, { stats }) => [`${value}`, `running, ${stats.num_waiting} waiting`],
    }),
    new Chart(figure("hits"), { read: hitRate(), ceiling: 1, write: (value) => [percent(value), "of prompt tokens"] }),
    new Chart(figure("tokens"), {
      read: smooth("generation_tokens"), write: (value) => [short(value), "generated"],
    }),
    new Chart(figure("evictions"), {
      read: smooth("reclaimed"),
      write: (value, { stats }) => [short(value), `blocks, ${stats.num_preemptions.toLocaleString("en")} preempted`],
    }),
  ];
}
