// The block map: one cell a block. The colours of all cells go into a small image, a pixel a block, which is blown up
// in one call; so a frame costs one pass over the blocks, however large they are drawn.

export const KINDS = ["free", "active", "shared", "cached", "pinned"];
const SMALLEST = 2, LARGEST = 20, GAP_FROM = 5;

function colourOf(style, name) {
  const hex = style.getPropertyValue(`--${name}`).trim().slice(1);
  return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

const packed = ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r;  // little-endian RGBA, as canvases have it
const mixed = (a, b, share) => a.map((value, i) => Math.round(value + (b[i] - value) * share));

export class BlockMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d", { alpha: false });
    this.image = document.createElement("canvas");
    this.shade = "kind";
    this.blocks = null;
    this.cursor = -1;
    this.near = null;  // the blocks that stand out
    this.readColours();
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    this.ink = style.getPropertyValue("--ink").trim();
    this.card = style.getPropertyValue("--card").trim();
    const card = colourOf(style, "card");
    const kinds = KINDS.map((kind) => colourOf(style, kind));
    this.plain = Uint32Array.from(kinds, packed);
    this.faint = Uint32Array.from(kinds, (colour) => packed(mixed(colour, card, 0.78)));
    const [near, far] = [colourOf(style, "other"), mixed(colourOf(style, "active"), card, 0.72)];
    this.ramp = Uint32Array.from({ length: 256 }, (_, i) => packed(mixed(near, far, i / 255)));
  }

  get count() { return this.blocks ? this.blocks.kinds.length : 0; }

  /** Choose how large a cell is, so that the whole pool fits into a part of the window. */
  layOut() {
    const width = Math.max(1, this.canvas.clientWidth);
    const height = Math.max(160, Math.min(460, window.innerHeight * 0.5));
    let cell = LARGEST;
    while (cell > SMALLEST && Math.ceil(this.count / Math.floor(width / cell)) * cell > height) cell -= 1;
    this.cell = cell;
    this.columns = Math.max(1, Math.floor(width / cell));
    this.rows = Math.max(1, Math.ceil(this.count / this.columns));
    this.scale = window.devicePixelRatio || 1;
    this.canvas.style.height = `${this.rows * cell}px`;
    const [w, h] = [Math.round(width * this.scale), Math.round(this.rows * cell * this.scale)];
    if (this.canvas.width !== w || this.canvas.height !== h) { this.canvas.width = w; this.canvas.height = h; }
    if (this.image.width !== this.columns || this.image.height !== this.rows || !this.pixels) {
      this.image.width = this.columns;
      this.image.height = this.rows;
      this.brush = this.image.getContext("2d");
      this.bitmap = this.brush.createImageData(this.columns, this.rows);
      this.pixels = new Uint32Array(this.bitmap.data.buffer);
    }
  }

  paint() {
    const { kinds, ages, depths } = this.blocks;
    const { pixels, plain, faint, ramp, near } = this;
    if (this.shade === "kind") {
      const colours = near ? faint : plain;
      for (let i = 0; i < kinds.length; i += 1) pixels[i] = colours[kinds[i]];
      if (near) for (const block of near) pixels[block] = plain[kinds[block]];
      return;
    }
    const values = this.shade === "age" ? ages : depths;
    let most = 1;
    for (let i = 0; i < values.length; i += 1) if (values[i] > most) most = values[i];
    // Ages and depths have long tails: the logarithm keeps the young and the shallow apart.
    const stretch = 255 / Math.log2(1 + most);
    for (let i = 0; i < kinds.length; i += 1) {
      pixels[i] = kinds[i] ? ramp[Math.min(255, Math.log2(1 + values[i]) * stretch) | 0] : plain[0];
    }
  }

  draw() {
    if (!this.blocks) return;
    this.layOut();
    this.pixels.fill(0);
    this.paint();
    this.brush.putImageData(this.bitmap, 0, 0);
    const { pen, cell, scale, columns, rows } = this;
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.fillStyle = this.card;
    pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.image, 0, 0, columns * cell, rows * cell);
    if (cell >= GAP_FROM) this.drawGaps();
    if (this.cursor >= 0 && this.cursor < this.count) this.drawCursor();
  }

  drawGaps() {
    const { pen, cell, columns, rows } = this;
    const gap = cell >= 12 ? 2 : 1;
    for (let x = 1; x <= columns; x += 1) pen.fillRect(x * cell - gap, 0, gap, rows * cell);
    for (let y = 1; y <= rows; y += 1) pen.fillRect(0, y * cell - gap, columns * cell, gap);
  }

  drawCursor() {
    const { pen, cell, columns } = this;
    const [x, y] = [(this.cursor % columns) * cell, Math.floor(this.cursor / columns) * cell];
    pen.strokeStyle = this.ink;
    pen.lineWidth = 2;
    pen.strokeRect(x - 1, y - 1, cell + (cell >= GAP_FROM ? 1 : 2), cell + (cell >= GAP_FROM ? 1 : 2));
  }

  /** Which block lies under a point of the window; −1 for none. */
  at(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [Math.floor((clientX - box.left) / this.cell), Math.floor((clientY - box.top) / this.cell)];
    const block = y * this.columns + x;
    return x >= 0 && x < this.columns && y >= 0 && block < this.count ? block : -1;
  }

  /** Where a key leads from the cursor; −1 if the key is not one of the map's. */
  after(key) {
    const from = Math.max(0, this.cursor), page = 10 * this.columns;
    const steps = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, PageUp: -page, PageDown: page,
      Home: -from, End: this.count - 1 - from,
    };
    if (!(key in steps) || !this.count) return -1;
    return this.cursor < 0 ? 0 : Math.min(this.count - 1, Math.max(0, from + steps[key]));
  }
}
