/* Brings what is shown up to date with the state, and starts the page. */

let asked = 0;
let drawn = ""; /* which picture is drawn */
let opening = false; /* nothing was chosen yet: the strongest cell will be */
let textOfPanel = NONE; /* of which panel the text is written */

function change(patch) {
  Object.assign(state, patch);
  mend();
  keepAddress();
  return refresh();
}

/* At once, as paper does not wait. */
function repaint() {
  const theme = currentTheme();
  if (document.documentElement.dataset.theme === theme) return;
  document.documentElement.dataset.theme = theme;
  paintScores();
  if (!picture) return;
  picture.recolour(palette(theme, shown.both));
  writeLegend(picture.range, picture.colours);
  drawNow();
}

async function refresh() {
  const request = ++asked;
  repaint();
  showControls();
  if (textOfPanel !== state.panel) {
    textOfPanel = state.panel;
    drawn = "";
    shown = picture = null;
    Object.assign(hover, { row: NONE, column: NONE });
    for (const id of ["map-card", "text-card"]) byId(id).hidden = !hasMaps();
    writeText();
    view.fitted = true;
    layOut();
  }
  writeTitles();
  drawCharts();
  const { panel: of, scope, part, versus, values, scale } = state;
  const wanted = [of, mapLayer(), scope, part, versus, comparing() || values, scale].join();
  if (panel().scores && scores?.key !== scoreKey()) stage.setAttribute("aria-busy", "true");
  await showScores();
  if (request !== asked) return;
  if (!hasMaps()) {
    stage.setAttribute("aria-busy", "false");
    return;
  }
  if (wanted !== drawn) {
    stage.setAttribute("aria-busy", "true");
    const slow = setTimeout(() => { byId("busy").hidden = false; }, 200);
    try {
      await show(request, wanted);
    } finally {
      clearTimeout(slow);
    }
    if (request !== asked) return;
    byId("busy").hidden = true;
    stage.setAttribute("aria-busy", "false");
  }
  if (opening) {
    opening = false;
    Object.assign(state, findStrongest());
  }
  shade();
  readOut();
  draw();
  await drawStrips(request);
}

/* Unpacks the maps that the state names and makes their picture; stops when something else was asked for meanwhile. */
async function show(request, wanted) {
  const [map, other] = await Promise.all([loadMap(state.scope), comparing() ? loadMap(state.versus) : null]);
  if (request !== asked) return;
  const next = measure(map, other, state.values);
  const range = rangeOf(next);
  const levels = await levelsOf(next, levelOf(range, state.scale, next.both));
  if (request !== asked) return;
  const colours = palette(currentTheme(), next.both);
  shown = next;
  picture = new Picture(levels, map.rows, map.columns, colours, next.both);
  picture.range = range;
  drawn = wanted;
  writeLegend(range, colours);
}

function writeTitles() {
  const part = partsOf()[state.part];
  const layer = `layer ${panel().layers[mapLayer()]}${part ? `, ${part},` : ""}`;
  const quoted = (name) => (panel().signed ? `“${name}”` : name);
  const other = comparing() ? `, minus ${quoted(scopeName(state.versus))}` : "";
  const plain = `${scopeName()}${part ? `, ${part}` : ""}, layer ${panel().layers[mapLayer()]}${other}`;
  const title = panel().signed ? `What passes in ${layer} on its way to ${quoted(scopeName())}${other}` : plain;
  byId("map-title").textContent = title;
  byId("map-what").textContent = panel().signed ? "" : describeShown();
  byId("score-card").hidden = !panel().scores;
  canvases.over.setAttribute("aria-label", `Map of ${title}: ${rows()} rows that read, ${columns()} columns that are read. Arrow keys move from cell to cell.`);
}

/* What the scopes mean, in a line. */
function describeShown() {
  if (!comparing()) return inWords();
  const both = [inWords(), inWords(state.versus)];
  const ff = ffDifference(panel());
  const added = ff && ff.scope === state.scope && ff.versus === state.versus;
  const what = both.every(Boolean) ? `${both[0]}, minus ${both[1]}` : "";
  return added ? `What the feed-forward block added to shares of rows (blue) and took (orange): ${what}` : what;
}

/* The cell with the largest change, or value, between two different tokens. Of large maps, among some rows. */
function findStrongest() {
  const step = Math.max(1, Math.floor((rows() * columns()) / 2 ** 22));
  let found = { row: NONE, column: NONE };
  let most = 0;
  for (let row = 0; row < rows(); row += step) {
    const own = columnOfRow(row);
    for (let column = 0; column < columns(); column++) {
      const size = column === own ? 0 : Math.abs(shown.value(row, column));
      if (size > most) [most, found] = [size, { row, column }];
    }
  }
  return found;
}

function writeLegend({ low, high }, colours) {
  const bar = byId("bar");
  const pen = bar.getContext("2d");
  for (let x = 0; x < 256; x++) {
    pen.fillStyle = colours.css[Math.max(x, 1)];
    pen.fillRect(x, 0, 1, 1);
  }
  const text = shown.say;
  const middle = shown.both ? 0 : state.scale === "log" ? Math.sqrt(low * high) : high / 2;
  const ends = shown.both ? [-high, 0, high] : [state.scale === "log" ? low : 0, middle, high];
  const strip = (value) => text(value).replace(" points", "");
  byId("ticks").replaceChildren(...ends.map((value) => element("span", strip(value))));
  const sides = [`← more in ${scopeName(state.versus)}`, "points", "more here →"];
  byId("none").hidden = shown.signed || !picture.has(0);
  const unit = shown.shares ? "share of the row" : `${DATA.measure} of what is read`;
  const said = shown.signed ? ["← against it", "what passes", "for it →"] : shown.both ? sides : [unit];
  byId("unit").replaceChildren(...said.map((part) => element("span", part)));
  byId("text-panes").classList.toggle("compared", shown.both);
  byId("readout").classList.toggle("compared", shown.both);
}

function writeHead() {
  const some = PANELS.some((one) => one.scores);
  byId("help-scores").hidden = !some;
  byId("help-maps").hidden = byId("help-drawing").hidden = byId("help-values").hidden = some;
  byId("title").textContent = DATA.title;
  byId("measure").textContent = DATA.measure[0].toUpperCase() + DATA.measure.slice(1);
  byId("facts").replaceChildren(...DATA.facts.map(([name, value]) => {
    const fact = element("div");
    fact.append(element("dt", name), element("dd", value));
    return fact;
  }));
  const accuracy = Number((DATA.accuracy * 100).toPrecision(2));
  byId("exactness").textContent = `Values in this page are within ±${accuracy} % of the computed ones; those below ` +
    `${DATA.floor.toExponential(0)} of the largest of their map count as that. Zeros and sums of rows are exact.`;
}

function start() {
  writeHead();
  readAddress();
  opening = location.hash.length <= 1 && hasMaps() && !panel().signed;
  watchControls();
  watchSaving();
  watchPointer();
  watchText();
  watchScores();
  addEventListener("hashchange", () => {
    readAddress();
    refresh();
  });
  const turn = (paper) => {
    onPaper = paper;
    refresh();
  };
  for (const query of [prefersDark, printing]) query.addEventListener("change", () => turn(printing.matches));
  addEventListener("beforeprint", () => turn(true));
  addEventListener("afterprint", () => turn(false));
  new ResizeObserver(() => {
    layOut();
    if (picture) drawNow();
  }).observe(stage);
  new ResizeObserver(drawCharts).observe(byId("chart-card"));
  new ResizeObserver(paintScores).observe(byId("score-stage"));
  refresh();
}

start();
