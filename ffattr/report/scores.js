/* What tokens give to a number: the text in colours, how it adds up, and a map of layers and tokens to click. */

const STRONGEST = 8;
const SCORE_LABEL = 58; /* pixels beside the map for the names of its rows */
const SCORE_BELOW = 84; /* and below it, at most, for those of tokens */

let scores = null; /* of which number, its map, and where its colours end */
let pointed = NONE; /* the token that the pointer is on */

const scoreKey = () => [state.panel, state.scope].join();
const inputOf = (place) => (place < panel().layers.length ? `the input of layer ${panel().layers[place]}` : "the output of the last layer");

/* Unpacks the scores of the number that the state names, and shows them at the layer that it names. */
async function showScores() {
  if (!panel().scores) {
    scores = null;
    return;
  }
  const key = scoreKey();
  if (scores?.key !== key) {
    const map = await loadScores();
    if (key !== scoreKey()) return;
    const value = (row, column) => map.table[map.codes[row * map.columns + column]];
    const first = Float64Array.from({ length: map.columns }, (_, column) => Math.abs(value(0, column)));
    scores = { key, map, value, top: scoreTop(first), longest: longestLabel() };
    writeScoreText();
  }
  writeScoreSum();
  writeScoreTop();
  paintScores();
}

/* Where colours end: at the largest score, but for a few that would leave the others none. */
function scoreTop(sizes) {
  const sorted = sizes.slice().sort().reverse();
  const [most, others] = [sorted[0], sorted[Math.max(1, Math.floor(sorted.length / 50))] || 0];
  return (others === 0 || most <= 4 * others ? most : 2 * others) || 1;
}

function longestLabel() {
  const pen = byId("score-map").getContext("2d");
  pen.font = `11px ${css("--sans")}`;
  return columnsAxis().labels.reduce((most, label) => Math.max(most, pen.measureText(label).width), 0);
}

const scoreLevel = (value) => 128 + Math.round(clamp(value / scores.top, -1, 1) * 127);
const scoresNow = () => Float64Array.from({ length: scores.map.columns }, (_, column) => scores.value(state.layer, column));

function writeScoreText() {
  const name = scopeName();
  const at = panel().scores.readAt[name];
  const place = columnsAxis().placeOf.get(at);
  const token = place === undefined ? [] : [", read at ", ...named(columnsAxis(), place)];
  byId("score-title").replaceChildren(`What speaks for “${name}”`, ...token);
  const parts = wordsOf(columnsAxis());
  byId("score-words").replaceChildren(...parts);
  byId("score-words").querySelector(`[data-place="${place}"]`)?.classList.add("own");
  byId("score-map").setAttribute("aria-label", `What ${columns()} tokens give to ${name} at ${layerNames().length} layers. ` +
    "Up and down keys change the layer, left and right keys the token.");
}

/* How the tokens and the rest add up to the number: a bar each, that begins where the one above ends. */
function writeScoreSum() {
  const { rest, values } = panel().scores;
  const now = scoresNow();
  const sum = (some) => now.reduce((total, value) => total + some(value), 0);
  const rows = [["For it", sum((value) => Math.max(value, 0))], ["Against it", sum((value) => Math.min(value, 0))]];
  for (const [name, numbers] of Object.entries(rest[scopeName()])) rows.push([name, numbers[state.layer]]);
  let at = 0;
  const bars = rows.map(([name, value]) => {
    const from = at;
    at += value;
    return { name, value, low: Math.min(from, at), high: Math.max(from, at) };
  });
  const total = values[scopeName()];
  bars.push({ name: "The number", value: total, low: Math.min(0, total), high: Math.max(0, total), whole: true });
  const low = Math.min(...bars.map((bar) => bar.low));
  const span = Math.max(...bars.map((bar) => bar.high)) - low || 1;
  byId("score-sum").tBodies[0].replaceChildren(...bars.map((bar) => {
    const line = element("tr", undefined, bar.whole ? "whole" : bar.value < 0 ? "less" : bar.value ? "" : "none");
    const name = element("th", bar.name[0].toUpperCase() + bar.name.slice(1));
    name.scope = "row";
    const length = element("span");
    length.style.setProperty("margin-left", `${(100 * (bar.low - low)) / span}%`);
    length.style.setProperty("width", `${(100 * (bar.high - bar.low)) / span}%`);
    const cell = element("td", undefined, "bar");
    cell.append(length);
    line.append(name, cell, element("td", withSign(bar.value)));
    return line;
  }));
}

function writeScoreTop() {
  const list = byId("score-top");
  const now = scoresNow();
  const order = Array.from(now.keys()).filter((place) => now[place] !== 0);
  order.sort((a, b) => Math.abs(now[b]) - Math.abs(now[a]) || a - b);
  byId("score-top-title").textContent = `Strongest tokens at ${inputOf(state.layer)}`;
  const focused = Array.from(list.children).findIndex((item) => item.contains(document.activeElement));
  list.replaceChildren(...order.slice(0, STRONGEST).map((place) => strongToken(place, now[place], Math.abs(now[order[0]]))));
  if (focused !== NONE) list.children[Math.min(focused, list.children.length - 1)]?.querySelector("button").focus();
}

function strongToken(place, value, most) {
  const item = element("li");
  item.dataset.place = place;
  const button = element("button", undefined, "pick");
  button.type = "button";
  button.append(...named(columnsAxis(), place));
  const bar = element("span", undefined, value < 0 ? "length less" : "length");
  bar.style.setProperty("--part", Math.abs(value) / most);
  item.append(button, bar, element("span", withSign(value), "value"));
  return item;
}

/* Colours of the text, the legend and the map; again when the page turns dark or changes its width. */
function paintScores() {
  if (!scores || !panel().scores) return;
  const colours = palette(currentTheme(), true);
  for (const word of byId("score-words").querySelectorAll(".word")) {
    const level = scoreLevel(scores.value(state.layer, Number(word.dataset.place)));
    word.style.setProperty("background", colours.css[level]);
    word.style.setProperty("color", colours.ink[level]);
    word.classList.toggle("other", Number(word.dataset.place) === state.column);
  }
  const bar = byId("score-bar").getContext("2d");
  for (let level = 1; level < 256; level++) {
    bar.fillStyle = colours.css[level];
    bar.fillRect(level - 1, 0, 1, 1);
  }
  byId("score-ticks").replaceChildren(...[-scores.top, 0, scores.top].map((value) => element("span", withSign(value))));
  drawScoreMap(colours);
  readScore();
}

/* Where the map and its rows and columns are on its canvas. */
function scorePlaces() {
  const { rows: high, columns: wide } = scores.map;
  const width = Math.max(byId("score-stage").clientWidth, 160);
  const cell = Math.min((width - SCORE_LABEL - 2) / wide, 40);
  const row = clamp(330 / high, 7, 22);
  const below = cell >= LABEL ? clamp(scores.longest + 14, 18, SCORE_BELOW) : 18;
  return { width, cell, row, high, wide, below, height: Math.ceil(row * high) + below };
}

function drawScoreMap(colours) {
  const canvas = byId("score-map");
  const { width, height, cell, row, high, wide, below } = scorePlaces();
  const ratio = devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  const pen = penOf(canvas);
  const step = Math.max(1, Math.floor(1 / (cell * ratio))); /* tokens in one pixel: the largest by size is seen */
  const edge = (place, size, from) => Math.round((from + place * size) * ratio) / ratio;
  for (let i = 0; i < high; i++) {
    const [top, bottom] = [edge(i, row, 0), edge(i + 1, row, 0)];
    for (let j = 0; j < wide; j += step) {
      let value = scores.value(i, j);
      for (let k = j + 1; k < Math.min(j + step, wide); k++) {
        const next = scores.value(i, k);
        if (Math.abs(next) > Math.abs(value)) value = next;
      }
      const [left, right] = [edge(j, cell, SCORE_LABEL), edge(Math.min(j + step, wide), cell, SCORE_LABEL)];
      pen.fillStyle = colours.css[scoreLevel(value)];
      pen.fillRect(left, top, right - left, bottom - top);
    }
  }
  nameScoreMap(pen, { cell, row, high, wide, below });
  const mark = (colour, x, y, w, h) => {
    pen.strokeStyle = colour;
    pen.lineWidth = 2;
    pen.strokeRect(x, y, w, h);
  };
  mark(css("--select"), SCORE_LABEL, state.layer * row + 1, wide * cell, Math.max(row - 2, 4));
  for (const [place, colour] of [[state.column, "--select"], [pointed, "--accent"]]) {
    if (place !== NONE) mark(css(colour), SCORE_LABEL + place * cell, 1, Math.max(cell, 2), high * row - 2);
  }
}

function nameScoreMap(pen, { cell, row, high, wide, below }) {
  const names = layerNames();
  const every = Math.ceil(12 / row);
  pen.font = `11px ${css("--sans")}`;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (let i = 0; i < high; i++) {
    const chosen = i === state.layer;
    const near = Math.abs(i - state.layer) < every || (i !== high - 1 && high - 1 - i < every);
    if (!chosen && i !== high - 1 && (i % every || near)) continue;
    if (!chosen && i === high - 1 && high - 1 - state.layer < every) continue;
    pen.fillStyle = css(chosen ? "--select" : "--ink");
    pen.fillText(i < high - 1 ? `layer ${names[i]}` : names[i], SCORE_LABEL - 6, (i + 0.5) * row);
  }
  pen.fillStyle = css("--ink");
  const { labels, positions } = columnsAxis();
  const step = cell >= LABEL ? 1 : Math.max(1, spacing(cell));
  for (let j = 0; j < wide; j += step) {
    const x = SCORE_LABEL + (j + 0.5) * cell;
    pen.save();
    pen.translate(x, high * row + 6);
    if (step === 1 && cell >= LABEL) {
      pen.rotate(-Math.PI / 2);
      pen.fillText(shortened(pen, labels[j], below - 10), 0, 0);
    } else {
      pen.textAlign = "center";
      pen.fillText(positions[j], 0, 6);
    }
    pen.restore();
  }
}

/* The line below the map, which is also what a screen reader says. */
function readScore() {
  const line = byId("score-readout");
  const place = pointed !== NONE ? pointed : state.column;
  const where = `at ${inputOf(state.layer)}`;
  line.dataset.column = place;
  line.dataset.value = place === NONE ? "" : scores.value(state.layer, place);
  if (place === NONE) {
    line.replaceChildren(element("span", `The text is shown ${where}.`, "soft"));
    return;
  }
  line.replaceChildren(...named(columnsAxis(), place), ` gives `, element("strong", withSign(scores.value(state.layer, place))), ` ${where}`);
}

function stepScores(down, right) {
  const column = state.column === NONE ? (right ? 0 : NONE) : clamp(state.column + right, 0, columns() - 1);
  change({ layer: state.layer + down, column });
}

function watchScores() {
  const canvas = byId("score-map");
  const cell = (event) => {
    const box = canvas.getBoundingClientRect();
    const { cell: size, row, high, wide } = scorePlaces();
    const column = within(Math.floor((event.clientX - box.left - SCORE_LABEL) / size), wide);
    return { layer: within(Math.floor((event.clientY - box.top) / row), high), column };
  };
  const hoverAt = (column) => {
    if (column === pointed || !scores) return;
    pointed = column;
    drawScoreMap(palette(currentTheme(), true));
    readScore();
  };
  canvas.addEventListener("pointermove", (event) => hoverAt(scores ? cell(event).column : NONE));
  canvas.addEventListener("pointerleave", () => hoverAt(NONE));
  canvas.addEventListener("click", (event) => {
    const { layer, column } = cell(event);
    change({ ...(layer === NONE ? {} : { layer }), ...(column === NONE ? {} : { column }) });
  });
  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const words = byId("score-words");
  for (const [target, keys] of [[canvas, arrows], [words, { ...arrows, ArrowUp: [0, -1], ArrowDown: [0, 1] }]]) {
    target.addEventListener("keydown", (event) => {
      if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      stepScores(...keys[event.key]);
      if (target === words) bringIntoSight(words, words.querySelector(`[data-place="${state.column}"]`));
    });
  }
  const placeOf = (event) => Number(event.target.closest("[data-place]")?.dataset.place ?? NONE);
  words.addEventListener("pointerover", (event) => hoverAt(placeOf(event)));
  words.addEventListener("pointerleave", () => hoverAt(NONE));
  for (const holder of [words, byId("score-top")]) {
    holder.addEventListener("click", (event) => {
      if (placeOf(event) !== NONE) change({ column: placeOf(event) });
    });
  }
}
