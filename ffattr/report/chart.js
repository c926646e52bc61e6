/* How much each component changes the map, by layer: a line each, and the same as a table. */

const KNOWN = ["FF", "RES", "LN", "FF block"]; /* of the same colour in every page */
const CHART = { height: 168, left: 40, right: 74, top: 10, bottom: 26 };

let tableOf = NONE; /* the panel whose numbers the table has */

function drawChart() {
  const { changes, layers } = panel();
  byId("chart-card").hidden = !changes.length;
  if (!changes.length) return;
  const found = [...new Set(changes.map(([, component]) => component))];
  const components = [...KNOWN.filter((name) => found.includes(name)), ...found.filter((name) => !KNOWN.includes(name))];
  const colour = (component) => `c${(KNOWN.includes(component) ? KNOWN : components).indexOf(component) % 4}`;
  const known = [...new Set(changes.map(([layer]) => layer))].sort((a, b) => a - b);
  const of = (layer, component) => changes.find(([at, name]) => at === layer && name === component)?.[2];
  if (tableOf !== state.panel) writeTable(components, known, of);
  tableOf = state.panel;
  for (const line of byId("table").tBodies[0].rows) {
    if (line.dataset.layer === String(layers[state.layer])) line.setAttribute("aria-current", "true");
    else line.removeAttribute("aria-current");
  }

  const svg = byId("chart");
  const make = (name, attributes, text) => {
    const made = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const width = Math.max(svg.clientWidth, 240);
  svg.setAttribute("viewBox", `0 0 ${width} ${CHART.height}`);
  const most = Math.max(...changes.map(([, , value]) => value), 0.01);
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1].find((one) => most / one <= 4) || 1;
  const top = Math.ceil(most / step - 1e-9) * step;
  const bottom = 0; /* of 1 minus a correlation; what rounding leaves below is drawn there */
  const room = width - CHART.left - CHART.right;
  const x = (layer) => CHART.left + (known.length > 1 ? (known.indexOf(layer) / (known.length - 1)) * (room - 20) + 10 : room / 2);
  const y = (value) => CHART.top + ((top - Math.max(value, bottom)) / (top - bottom)) * (CHART.height - CHART.top - CHART.bottom);
  const parts = [];

  const now = layers[state.layer];
  if (known.includes(now)) {
    parts.push(make("rect", { class: "now", x: x(now) - 9, y: CHART.top - 4, width: 18, height: CHART.height - CHART.top - CHART.bottom + 8, rx: 4 }));
  }
  for (let value = bottom; value <= top + step / 2; value += step) {
    parts.push(make("line", { class: "grid", x1: CHART.left, x2: width - CHART.right, y1: y(value), y2: y(value) }));
    parts.push(make("text", { class: "tick", x: CHART.left - 6, y: y(value) + 3.5, "text-anchor": "end" }, Number(value.toFixed(2))));
  }
  const every = Math.ceil(known.length / Math.max(2, Math.floor(room / 26)));
  known.forEach((layer, place) => {
    const chosen = layer === now;
    if (!chosen && (place % every || (known.includes(now) && every > 1 && Math.abs(place - known.indexOf(now)) < every))) return;
    parts.push(make("text", { class: chosen ? "tick chosen" : "tick", x: x(layer), y: CHART.height - 9, "text-anchor": "middle" }, layer));
  });
  parts.push(make("text", { class: "tick", x: width - CHART.right + 6, y: CHART.height - 9 }, "layer"));

  const ends = [];
  components.forEach((component) => {
    const points = known.filter((layer) => of(layer, component) !== undefined);
    const at = points.map((layer) => [x(layer), y(of(layer, component))]);
    parts.push(make("path", { class: `line ${colour(component)}`, d: at.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("") }));
    at.forEach(([a, b], i) => {
      const dot = make("circle", { class: `dot ${colour(component)}`, cx: a, cy: b, r: points[i] === now ? 4 : 2.6 });
      dot.append(make("title", {}, `${component}, layer ${points[i]}: ${of(points[i], component).toFixed(3)}`));
      parts.push(dot);
    });
    ends.push({ component, y: at[at.length - 1][1] });
  });
  ends.sort((a, b) => a.y - b.y);
  ends.forEach((end, i) => {
    end.y = Math.max(end.y, i ? ends[i - 1].y + 14 : CHART.top + 4);
  });
  const over = ends.length ? Math.max(ends[ends.length - 1].y - (CHART.height - CHART.bottom), 0) : 0;
  for (const { component, y: at } of ends) {
    parts.push(make("text", { class: `name ${colour(component)}`, x: width - CHART.right + 6, y: at - over + 4 }, component));
  }
  svg.replaceChildren(...parts);
  svg.onclick = (event) => {
    const box = svg.getBoundingClientRect();
    const clicked = ((event.clientX - box.left) / box.width) * width;
    const nearest = layers.filter((layer) => known.includes(layer)).sort((a, b) => Math.abs(x(a) - clicked) - Math.abs(x(b) - clicked))[0];
    if (nearest !== undefined) change({ layer: layers.indexOf(nearest) });
  };
}

function writeTable(components, known, of) {
  const table = byId("table");
  const head = element("tr");
  for (const name of ["Layer", ...components]) {
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
    line.append(name, ...components.map((component) => element("td", of(layer, component)?.toFixed(3) ?? "–")));
    return line;
  }));
}
