/* From the text of a map in the page to its codes: see `Coded` in encode.py. Unpacked when first shown. */

const KEPT_BYTES = 2 ** 27;
const unpacked = new Map(); /* number of a map -> promise of it; the one used last comes last */
const pause = () => new Promise((resolve) => setTimeout(resolve));

function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function inflate(text) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/* Does `work(first, last)` for ranges of rows, and lets the page breathe in between. */
async function inChunks(rows, columns, work) {
  const step = Math.max(1, Math.floor(2 ** 21 / columns));
  for (let first = 0; first < rows; first += step) {
    if (first) await pause();
    work(first, Math.min(first + step, rows));
  }
}

async function unpack([number, top, levels, above, signs], rows, columns) {
  const texts = byId(`map-${number}`).textContent.split(".");
  const bits = signs ? await inflate(texts.pop()) : null;
  const [sums, low, high] = texts;
  const lowBytes = await inflate(low);
  const highBytes = high ? await inflate(high) : null;
  const codes = highBytes ? new Uint16Array(lowBytes.length) : lowBytes;
  await inChunks(rows, columns, (first, last) => {
    if (highBytes) {
      for (let i = first * columns; i < last * columns; i++) codes[i] = lowBytes[i] | (highBytes[i] << 8);
    }
    if (above) {
      for (let i = Math.max(first, 1) * columns; i < last * columns; i++) {
        const sum = codes[i] + codes[i - columns];
        codes[i] = sum > levels ? sum - levels - 1 : sum;
      }
    }
  });
  const table = new Float64Array(levels + 1);
  for (let code = 1; code <= levels; code++) table[code] = top && top * Math.exp(DATA.step * (code - levels));
  const rowSums = new Float32Array(bytesOf(sums).buffer);
  const map = { rows, columns, codes, table, sums: rowSums, levels, top };
  return bits ? withSigns(map, bits) : map;
}

/* The same map with codes from the most negative value, 0, over zero, `levels`, to the most positive one. */
async function withSigns({ rows, columns, codes, table, sums, levels, top }, bits) {
  const both = Float64Array.from({ length: 2 * levels + 1 }, (_, code) => Math.sign(code - levels) * table[Math.abs(code - levels)]);
  const signed = new Uint32Array(rows * columns);
  await inChunks(rows, columns, (first, last) => {
    for (let i = first * columns; i < last * columns; i++) {
      signed[i] = (bits[i >> 3] >> (7 - (i & 7))) & 1 ? levels - codes[i] : levels + codes[i];
    }
  });
  return { rows, columns, codes: signed, table: both, sums, levels: 2 * levels, top };
}

/* The map of a scope, in the layer and part that the state names if no others are. */
function loadMap(scope, layer = mapLayer(), part = state.part) {
  const { maps, queries, keys } = panel();
  const parts = maps[scopeName(scope)][layer];
  return loadEntry(parts[Math.min(part, parts.length - 1)], queries.length, keys.length);
}

/* The scores of a number: a row for each boundary, a column for each token. */
function loadScores(scope = state.scope) {
  const { scores, keys } = panel();
  return loadEntry(scores.maps[scopeName(scope)], scores.boundaries.length, keys.length);
}

function loadEntry(entry, height, width) {
  const found = unpacked.get(entry[0]) || unpack(entry, height, width);
  unpacked.delete(entry[0]);
  unpacked.set(entry[0], found);
  const most = Math.max(2, Math.floor(KEPT_BYTES / (height * width * (entry[4] ? 4 : 2))));
  for (const old of unpacked.keys()) {
    if (unpacked.size <= most) break;
    unpacked.delete(old);
  }
  return found;
}
