/* Numbers by layer, a line for each name, and the same as a table: how much each component changes the map, and the
   angle between what the feed-forward network writes and what bypasses it. */

const KNOWN = ["FF", "RES", "LN", "FF block"]; /* of the same colour in every page */
const PAIRS = { others: "other pairs", own: "own pairs" };
const CHART = { height: 168, left: 40, right: 80, top: 10, bottom: 26 };

let tablesOf = NONE; /* the panel whose numbers the tables have */

function drawCharts() {
  const { changes, angles } = panel();
  byId("chart-card").hidden = !changes.length;
  byId("angle-card").hidden = !angles.length;
  const found = [...new Set(changes.map(([, component]) => component))];
  const components = [...KNOWN.filter((name) => found.includes(name)), ...found.filter((name) => !KNOWN.includes(name))];
  const write = tablesOf !== state.panel;
  tablesOf = state.panel;
  if (changes.length) {
    drawLines(byId("chart"), changes, components, (name) => (KNOWN.includes(name) ? KNOWN : components).indexOf(name) % 4);
    const columns = components.map((name) => [name, (layer) => find(changes, layer, name)?.[2].toFixed(3)]);
    showTable(byId("table"), changes, columns, write);
  }
  if (angles.length) {
    const named = angles.map(([layer, pairs, median, negative]) => [layer, PAIRS[pairs], median, negative]);
    const names = Object.values(PAIRS).filter((name) => named.some(([, one]) => one === name));
    drawLines(byId("angle"), named, names, (name) => (name === PAIRS.own ? 1 : 0));
    const columns = names.flatMap((name) => [
      [`${name}, median`, (layer) => writeCosine(find(named, layer, name)?.[2])],
      ["below 0", (layer) => writePart(find(named, layer, name)?.[3])],
    ]);
    showTable(byId("angle-table"), named, columns, write);
  }
}

const find = (rows, layer, name) => rows.find(([at, of]) => at === layer && of === name);
const writeCosine = (value) => value?.toFixed(2).replace("-", "\u2212");
const writePart = (part) => (part === undefined ? undefined : `${Math.round(part * 100)} %`);
const listLayers = (rows) => [...new Set(rows.map(([layer]) => layer))].sort((a, b) => a - b);

/* rows: [layer, name, value, ...]. Zero is always in sight, and nothing is drawn beyond it that rounding left there. */
function drawLines(svg, rows, names, number) {
  const known = listLayers(rows);
  const of = (layer, name) => find(rows, layer, name)?.[2];
  const make = (name, attributes, text) => {
    const made = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const width = Math.max(svg.clientWidth, 240);
  svg.setAttribute("viewBox", `0 0 ${width} ${CHART.height}`);
  const values = rows.map(([, , value]) => value);
  const most = Math.max(...values, 0), least = Math.min(...values, 0);
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1].find((one) => Math.max(most - least, 0.01) / one <= 4) || 1;
  const top = Math.max(Math.ceil(most / step - 1e-9), least < -1e-9 ? 0 : 1) * step;
  const bottom = Math.min(Math.floor(least / step + 1e-9), 0) * step;
  const room = width - CHART.left - CHART.right, floor = CHART.height - CHART.bottom;
  const x = (layer) => CHART.left + (known.length > 1 ? (known.indexOf(layer) / (known.length - 1)) * (room - 20) + 10 : room / 2);
  const y = (value) => CHART.top + ((top - clamp(value, bottom, top)) / (top - bottom)) * (floor - CHART.top);
  const parts = [];

  const now = panel().layers[state.layer];
  if (known.includes(now)) {
    parts.push(make("rect", { class: "now", x: x(now) - 9, y: CHART.top - 4, width: 18, height: floor - CHART.top + 8, rx: 4 }));
  }
  for (let count = Math.round(bottom / step); count <= Math.round(top / step); count++) {
    const at = y(count * step);
    parts.push(make("line", { class: count || !bottom ? "grid" : "grid zero", x1: CHART.left, x2: width - CHART.right, y1: at, y2: at }));
    parts.push(make("text", { class: "tick", x: CHART.left - 6, y: at + 3.5, "text-anchor": "end" }, String(Number((count * step).toFixed(2))).replace("-", "\u2212")));
  }
  const every = Math.ceil(known.length / Math.max(2, Math.floor(room / 26)));
  known.forEach((layer, place) => {
    const chosen = layer === now;
    if (!chosen && (place % every || (known.includes(now) && every > 1 && Math.abs(place - known.indexOf(now)) < every))) return;
    parts.push(make("text", { class: chosen ? "tick chosen" : "tick", x: x(layer), y: CHART.height - 9, "text-anchor": "middle" }, layer));
  });
  parts.push(make("text", { class: "tick", x: width - CHART.right + 6, y: CHART.height - 9 }, "layer"));

  const ends = [];
  for (const name of names) {
    const points = known.filter((layer) => of(layer, name) !== undefined);
    const at = points.map((layer) => [x(layer), y(of(layer, name))]);
    const kind = `c${number(name)}`;
    parts.push(make("path", { class: `line ${kind}`, d: at.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("") }));
    at.forEach(([a, b], i) => {
      const dot = make("circle", { class: `dot ${kind}`, cx: a, cy: b, r: points[i] === now ? 4 : 2.6 });
      dot.append(make("title", {}, `${name}, layer ${points[i]}: ${of(points[i], name).toFixed(3)}`));
      parts.push(dot);
    });
    ends.push({ name, kind, y: at[at.length - 1][1] });
  }
  ends.sort((a, b) => a.y - b.y);
  ends.forEach((end, i) => {
    end.y = Math.max(end.y, i ? ends[i - 1].y + 14 : CHART.top + 4);
  });
  const over = ends.length ? Math.max(ends[ends.length - 1].y - floor, 0) : 0;
  for (const { name, kind, y: at } of ends) {
    parts.push(make("text", { class: `name ${kind}`, x: width - CHART.right + 6, y: at - over + 4 }, name));
  }
  svg.replaceChildren(...parts);
  svg.onclick = (event) => {
    const box = svg.getBoundingClientRect();
    const clicked = ((event.clientX - box.left) / box.width) * width;
    const { layers } = panel();
    const nearest = layers.filter((layer) => known.includes(layer)).sort((a, b) => Math.abs(x(a) - clicked) - Math.abs(x(b) - clicked))[0];
    if (nearest !== undefined) change({ layer: layers.indexOf(nearest) });
  };
}

/* columns: [name, text of a layer]. The line of the layer in sight is marked. */
function showTable(table, rows, columns, write) {
  if (write) writeTable(table, listLayers(rows), columns);
  for (const line of table.tBodies[0].rows) {
    if (line.dataset.layer === String(panel().layers[state.layer])) line.setAttribute("aria-current", "true");
    else line.removeAttribute("aria-current");
  }
}

function writeTable(table, known, columns) {
  const head = element("tr");
  for (const name of ["Layer", ...columns.map(([name]) => name)]) {
    const cell = element("th", name);
    cell.scope = "col";
    head.append(cell);
  }
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...known.map((layer) => {
    const line = element("tr");
    line.dataset.layer = layer;
    const name = element("th");
    name.scope = "row";
    const place = panel().layers.indexOf(layer);
    if (place === NONE) {
      name.textContent = layer;
    } else {
      const button = element("button", layer, "pick");
      button.type = "button";
      button.setAttribute("aria-label", `Show layer ${layer}`);
      button.addEventListener("click", () => change({ layer: place }));
      name.append(button);
    }
    line.append(name, ...columns.map(([, text]) => element("td", text(layer) ?? "–")));
    return line;
  }));
}
