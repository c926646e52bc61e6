/* Small maps of all layers, and of all heads or experts of a layer, to choose from: with colours of their own each. */

const MOST_CELLS = 2 ** 23; /* of all small maps together; beyond that they would take seconds */
const strips = { layer: { drawn: "", buttons: [] }, part: { drawn: "", buttons: [] } };

/* Makes or updates the buttons; their pictures follow one by one, until something else is asked for. */
async function drawStrips(request) {
  const { layers } = panel();
  const parts = partsOf();
  const common = [state.panel, state.scope, state.versus, comparing() || state.values, state.scale, currentTheme()];
  const cells = rows() * columns() * (comparing() ? 2 : 1);
  const wanted = {
    layer: { count: layers.length, key: [...common, parts.length && state.part].join(), name: (place) => layers[place] },
    part: { count: parts.length, key: [...common, mapLayer()].join(), name: (place) => /\d+$/.exec(parts[place])?.[0] ?? parts[place] },
  };
  byId("strip-title").textContent = parts.length ? `Layers, and ${byId("part-name").textContent.toLowerCase()}s of layer ${layers[mapLayer()]}` : "Layers";
  let any = false;
  for (const [name, { count, key, name: nameOf }] of Object.entries(wanted)) {
    const holder = byId(`strip-${name}`);
    holder.hidden = count < 2 || count * cells > MOST_CELLS;
    any ||= !holder.hidden;
    if (holder.hidden) continue;
    const strip = strips[name];
    if (strip.drawn !== key) {
      strip.drawn = key;
      strip.buttons = Array.from({ length: count }, (_, place) => smallMap(name, place, nameOf(place)));
      holder.replaceChildren(...strip.buttons);
    }
    const now = name === "layer" ? mapLayer() : state.part;
    strip.buttons.forEach((button, place) => button.setAttribute("aria-pressed", String(place === now)));
  }
  byId("strip-card").hidden = !any;
  for (const [name, { key }] of Object.entries(wanted)) {
    if (byId(`strip-${name}`).hidden) continue;
    for (const [place, button] of strips[name].buttons.entries()) {
      if (button.dataset.painted) continue;
      await paintSmall(button.firstChild, name === "layer" ? place : mapLayer(), name === "part" ? place : state.part);
      button.dataset.painted = "yes";
      await pause();
      if (request !== asked || strips[name].drawn !== key) return;
    }
  }
}

function smallMap(name, place, label) {
  const button = element("button", undefined, "small");
  button.type = "button";
  button.setAttribute("aria-label", `Show ${name === "layer" ? "layer" : byId("part-name").textContent.toLowerCase()} ${label}`);
  button.append(element("canvas"), element("span", label));
  button.addEventListener("click", () => change({ [name]: place }));
  return button;
}

async function paintSmall(canvas, layer, part) {
  const [map, other] = await Promise.all([
    loadMap(state.scope, layer, part), comparing() ? loadMap(state.versus, layer, part) : null,
  ]);
  const one = measure(map, other, state.values);
  const levels = await levelsOf(one, levelOf(rangeOf(one), state.scale, one.both));
  const small = new Picture(levels, map.rows, map.columns, palette(currentTheme(), one.both), one.both);
  const halvings = (count) => Math.max(0, Math.ceil(Math.log2(count / 128)));
  const [down, across] = [halvings(map.rows), halvings(map.columns)];
  const tile = small.tile(down, across, 0, 0);
  canvas.width = tile.width;
  canvas.height = tile.height;
  canvas.getContext("2d").drawImage(tile, 0, 0);
}
