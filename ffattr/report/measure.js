/* What a cell shows: a norm, a share of its row, a difference of two shares, or a number with a sign; and its colour. */

const DIGITS = DATA.accuracy < 0.002 ? 4 : 3;
const SAMPLE = 100_000;
const DECADES = 4; /* of a logarithmic scale, at most */

function written(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(DIGITS - 1).replace("e+", "e");
  const rounded = value.toPrecision(DIGITS);
  return rounded.includes("e") ? String(Number(rounded)) : rounded;
}

/* Shares are read at a glance: three digits. */
const percent = (share) => {
  const value = 100 * share;
  return `${value === 0 ? 0 : Math.abs(value) >= 0.01 ? value.toPrecision(3) : value.toExponential(1)} %`;
};
const signed = (share) => `${share > 0 ? "+" : share < 0 ? "−" : ""}${percent(Math.abs(share)).replace(" %", "")} points`;

const withSign = (value) => (value === 0 ? "0" : `${value > 0 ? "+" : "−"}${written(Math.abs(value))}`);

const brief = (value) => (value === 0 ? "0" : `${value > 0 ? "+" : "−"}${Number(Math.abs(value).toPrecision(2))}`);

/* `norm`, `share`, `other` (a share) and `value`, which is what is drawn, of a row and a column. */
function measure(map, other, values) {
  if (panel().signed) return measureSigned(map, other);
  const { columns, codes, table, sums } = map;
  const norm = (row, column) => table[codes[row * columns + column]];
  const share = (row, column) => (sums[row] ? norm(row, column) / sums[row] : 0);
  const otherShare = (row, column) =>
    other.sums[row] ? other.table[other.codes[row * columns + column]] / other.sums[row] : 0;
  const value = other
    ? (row, column) => share(row, column) - otherShare(row, column)
    : values === "share" ? share : norm;
  const shares = Boolean(other) || values === "share";
  const say = other ? signed : shares ? percent : written;
  return { map, other, norm, share, otherShare, value, say, both: Boolean(other), shares };
}

/* Of maps with signs: the entries, or what is left of them without those of another map. */
function measureSigned(map, other) {
  const entry = ({ columns, codes, table }) => (row, column) => table[codes[row * columns + column]];
  const norm = entry(map);
  const otherNorm = other && entry(other);
  const value = other ? (row, column) => norm(row, column) - otherNorm(row, column) : norm;
  return { map, other, norm, otherNorm, value, say: withSign, brief, both: true, shares: false, signed: true };
}

/* Ends of the colour scale: a few entries may be beyond them. In many language models what the first token keeps of itself
   is a hundred times everything else, and would leave it no colour. */
function rangeOf({ map, value, both }) {
  const { rows, columns } = map;
  const step = Math.max(1, Math.floor((rows * columns) / SAMPLE)) | 1;
  const sample = [];
  for (let i = 0; i < rows * columns; i += step) {
    const found = Math.abs(value(Math.floor(i / columns), i % columns));
    if (found > 0) sample.push(found);
  }
  if (!sample.length) return { low: 0.1, high: 1 };
  const sorted = Float64Array.from(sample).sort();
  const high = sorted[sorted.length - 1 - Math.floor(sorted.length / (both ? 200 : 1000))];
  const least = sorted[Math.floor(sorted.length * 0.01)];
  return { low: clamp(least, high * 10 ** -DECADES, high * 0.5), high };
}

/* 0 to 255 from a value: 0 is an exact zero; of differences that is 128, and 0 where nothing is compared. */
function levelOf(range, scale, both) {
  const { low, high } = range;
  if (both) {
    const bend = scale === "log" ? (x) => Math.log1p(x * 30) / Math.log1p(30) : (x) => x;
    return (value) => 128 + Math.round(Math.sign(value) * bend(Math.min(Math.abs(value) / high, 1)) * 127);
  }
  if (scale === "linear") return (value) => (value > 0 ? 1 + Math.round(Math.min(value / high, 1) * 254) : 0);
  const width = Math.log(high / low);
  return (value) => (value > 0 ? 1 + Math.round(clamp(Math.log(value / low) / width, 0, 1) * 254) : 0);
}
