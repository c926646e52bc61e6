/* Brings what is shown up to date with the state, and starts the page. */

let asked = 0;
let drawn = ""; /* which picture is drawn */
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
    writeText();
    view.fitted = true;
    layOut();
  }
  writeTitles();
  drawChart();
  const { panel: of, layer, scope, part, versus, values, scale } = state;
  const wanted = [of, layer, scope, part, versus, comparing() || values, scale].join();
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
  const name = `${scopeName()}${part ? `, ${part}` : ""}, layer ${panel().layers[state.layer]}`;
  const title = comparing() ? `${name}, minus ${scopeName(state.versus)}` : name;
  byId("map-title").textContent = title;
  canvases.over.setAttribute("aria-label", `Map of ${title}: ${rows()} rows that read, ${columns()} columns that are read. Arrow keys move from cell to cell.`);
}

function writeLegend({ low, high }, colours) {
  const bar = byId("bar");
  const pen = bar.getContext("2d");
  for (let x = 0; x < 256; x++) {
    pen.fillStyle = colours.css[Math.max(x, 1)];
    pen.fillRect(x, 0, 1, 1);
  }
  const text = shown.both ? signed : shown.shares ? percent : written;
  const middle = shown.both ? 0 : state.scale === "log" ? Math.sqrt(low * high) : high / 2;
  const ends = shown.both ? [-high, 0, high] : [state.scale === "log" ? low : 0, middle, high];
  const strip = (value) => text(value).replace(" points", "");
  byId("ticks").replaceChildren(...ends.map((value) => element("span", strip(value))));
  const sides = [`← more in ${scopeName(state.versus)}`, "points", "more here →"];
  const unit = shown.shares ? "share of the row" : `${DATA.measure} of what is read`;
  byId("unit").replaceChildren(...(shown.both ? sides : [unit]).map((part) => element("span", part)));
  byId("text-panes").classList.toggle("compared", shown.both);
  byId("readout").classList.toggle("compared", shown.both);
}

function writeHead() {
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
  watchControls();
  watchPointer();
  watchText();
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
  new ResizeObserver(drawChart).observe(byId("chart-card"));
  refresh();
}

start();
