/* A map as colour levels, smaller copies of it that keep its largest entries, and tiles of pixels of them. */

const TILE = 256;
const TILES = 192;

/* Levels of every cell. Of a norm or a share they follow from its code, so that a table can be made for each row. */
async function levelsOf(shown, level) {
  const { map, other, shares, value } = shown;
  const { rows, columns, codes, table, sums } = map;
  const levels = new Uint8Array(rows * columns);
  const plain = Uint8Array.from(table, (value) => level(value));
  const direct = map.levels < columns ? new Uint8Array(map.levels + 1) : null;
  const fill = (row) => {
    const start = row * columns;
    if (shown.signed && other) {
      for (let i = start; i < start + columns; i++) levels[i] = level(value(row, i - start));
    } else if (other) {
      const first = sums[row] ? 1 / sums[row] : 0;
      const second = other.sums[row] ? 1 / other.sums[row] : 0;
      for (let i = start; i < start + columns; i++) {
        levels[i] = codes[i] || other.codes[i] ? level(table[codes[i]] * first - other.table[other.codes[i]] * second) : 0;
      }
    } else if (!shares) {
      for (let i = start; i < start + columns; i++) levels[i] = plain[codes[i]];
    } else if (direct) {
      for (let code = 0; code < direct.length; code++) direct[code] = sums[row] ? level(table[code] / sums[row]) : 0;
      for (let i = start; i < start + columns; i++) levels[i] = direct[codes[i]];
    } else {
      for (let i = start; i < start + columns; i++) levels[i] = sums[row] ? level(table[codes[i]] / sums[row]) : 0;
    }
  };
  await inChunks(rows, columns, (first, last) => {
    for (let row = first; row < last; row++) fill(row);
  });
  return levels;
}

class Picture {
  constructor(levels, rows, columns, colours, both) {
    Object.assign(this, { rows, columns, colours });
    const farther = (a, b) => (!b || (a && Math.abs(a - 128) >= Math.abs(b - 128)) ? a : b);
    this.larger = both ? farther : (a, b) => (a > b ? a : b);
    this.sizes = new Map([["0.0", { rows, columns, levels }]]);
    this.tiles = new Map();
  }

  level(row, column) {
    return this.sizes.get("0.0").levels[row * this.columns + column];
  }

  /* Whether a cell has this level. */
  has(level) {
    return this.sizes.get("0.0").levels.includes(level);
  }

  recolour(colours) {
    this.colours = colours;
    this.tiles.clear();
  }

  /* The map with 2 ** down rows and 2 ** across columns taken together: thin stripes stay. */
  smaller(down, across) {
    const key = `${down}.${across}`;
    if (!this.sizes.has(key)) {
      this.sizes.set(key, down >= across ? this.halveRows(this.smaller(down - 1, across)) : this.halveColumns(this.smaller(down, across - 1)));
    }
    return this.sizes.get(key);
  }

  halveRows({ rows, columns, levels }) {
    const half = new Uint8Array(Math.ceil(rows / 2) * columns);
    for (let row = 0; row < rows; row += 2) {
      const to = (row / 2) * columns;
      const next = row + 1 < rows ? columns : 0;
      for (let column = 0; column < columns; column++) {
        const at = row * columns + column;
        half[to + column] = this.larger(levels[at], levels[at + next]);
      }
    }
    return { rows: Math.ceil(rows / 2), columns, levels: half };
  }

  halveColumns({ rows, columns, levels }) {
    const width = Math.ceil(columns / 2);
    const half = new Uint8Array(rows * width);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column += 2) {
        const at = row * columns + column;
        half[row * width + column / 2] = this.larger(levels[at], levels[column + 1 < columns ? at + 1 : at]);
      }
    }
    return { rows, columns: width, levels: half };
  }

  tile(down, across, y, x) {
    const key = `${down}.${across}.${y}.${x}`;
    const found = this.tiles.get(key) || this.paint(this.smaller(down, across), y * TILE, x * TILE);
    this.tiles.delete(key);
    this.tiles.set(key, found);
    if (this.tiles.size > TILES) this.tiles.delete(this.tiles.keys().next().value);
    return found;
  }

  paint({ rows, columns, levels }, top, left) {
    const height = Math.min(TILE, rows - top);
    const width = Math.min(TILE, columns - left);
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    const image = new ImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let row = 0; row < height; row++) {
      const from = (top + row) * columns + left;
      for (let column = 0; column < width; column++) {
        pixels[row * width + column] = this.colours.pixels[levels[from + column]];
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }
}
