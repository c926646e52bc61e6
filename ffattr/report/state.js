/* What the page holds, what it shows of it, and the address that reopens the same view. */

const byId = (id) => document.getElementById(id);
const DATA = JSON.parse(byId("data").textContent);
const PANELS = DATA.panels;
const NONE = -1;

const DEFAULTS = {
  panel: 0, layer: 0, scope: 0, part: 0, versus: NONE, row: NONE, column: NONE,
  values: "norm", scale: "log", panes: "both", theme: "",
};
const CHOICES = {
  values: ["norm", "share"], scale: ["log", "linear"], panes: ["reads", "feeds", "both"], theme: ["", "light", "dark"],
};
/* Deepest layer and last scope: what a reader most likely came for. Of scores, the input and the first number. */
const START = PANELS[0].scores ? DEFAULTS : { ...DEFAULTS, layer: PANELS[0].layers.length - 1, scope: PANELS[0].scopes.length - 1 };
/* Without an address: what the feed-forward block added, which is what these maps are about. */
const OPENING = { ...START, ...ffDifference(PANELS[0]) };
const state = { ...OPENING };
const hover = { row: NONE, column: NONE };

/* The last scope behind the feed-forward block, and the whole attention block before it; null where one is missing. */
function ffDifference({ scopes, signed }) {
  const scope = scopes.findLastIndex((name) => /_ff(_res|_ln)*$/.test(name));
  if (signed || scope === NONE) return null;
  const versus = scopes.indexOf(`${/^(.*\.)?/.exec(scopes[scope])[0]}atb`);
  return versus === NONE ? null : { scope, versus };
}

const panel = () => PANELS[state.panel];
const scopeName = (place = state.scope) => panel().scopes[place];
/* What a scope is in words; nothing where its name says all. */
const inWords = (place = state.scope) => (panel().words[place] === scopeName(place) ? "" : panel().words[place]);
const partsOf = (place = state.scope) => panel().parts[scopeName(place)] || [];
const hasMaps = () => Object.keys(panel().maps).length > 0;
const comparing = () => state.versus !== NONE && hasMaps();
/* Scores are at boundaries: the input of each layer, and the output of the last one, which has no map of its own. */
const OUTPUT = "output";
const layerNames = () => [...panel().layers.map(String), ...(panel().scores ? [OUTPUT] : [])];
const mapLayer = () => Math.min(state.layer, panel().layers.length - 1);
const clamp = (value, least, most) => Math.min(Math.max(value, least), most);
const within = (value, count) => (value >= 0 && value < count ? value : NONE);

/* Makes any state one that exists: what was asked for may belong to another panel. */
function mend() {
  state.panel = clamp(state.panel, 0, PANELS.length - 1);
  const { scopes, queries, keys } = panel();
  state.layer = clamp(state.layer, 0, layerNames().length - 1);
  state.scope = clamp(state.scope, 0, scopes.length - 1);
  state.versus = state.versus === state.scope ? NONE : within(state.versus, scopes.length);
  const parts = Math.max(partsOf().length, comparing() ? partsOf(state.versus).length : 0);
  state.part = clamp(state.part, 0, Math.max(parts - 1, 0));
  state.row = within(state.row, queries.length);
  state.column = within(state.column, keys.length);
}

/* Browsers complain of addresses that change many times a second, as they would while an arrow key is held. */
let writing = 0;
function keepAddress() {
  clearTimeout(writing);
  writing = setTimeout(writeAddress, 200);
}

/* Layers and scopes go into the address by name, everything else by number. */
function writeAddress() {
  const address = new URLSearchParams();
  const named = {
    layer: () => layerNames()[state.layer], scope: () => scopeName(), versus: () => scopeName(state.versus),
  };
  for (const [name, value] of Object.entries(state)) {
    if (value !== START[name] || name === "layer" || name === "scope") {
      address.set(name, named[name] && value !== NONE ? named[name]() : value);
    }
  }
  try {
    history.replaceState(null, "", `#${address}`);
  } catch {
    /* A document without an address of its own, such as one inside a notebook. */
  }
}

function readAddress() {
  clearTimeout(writing);
  Object.assign(state, location.hash.length > 1 ? START : OPENING);
  const address = new URLSearchParams(location.hash.slice(1));
  const number = (name) => {
    const value = Number.parseInt(address.get(name), 10);
    if (Number.isInteger(value)) state[name] = value;
  };
  for (const name of ["panel", "part", "row", "column"]) number(name);
  state.panel = clamp(state.panel, 0, PANELS.length - 1);
  const place = (name, of) => {
    const found = address.has(name) ? of.indexOf(address.get(name)) : NONE;
    if (found !== NONE) state[name] = found;
  };
  place("layer", layerNames());
  place("scope", panel().scopes);
  place("versus", panel().scopes);
  for (const [name, allowed] of Object.entries(CHOICES)) {
    if (allowed.includes(address.get(name))) state[name] = address.get(name);
  }
  mend();
}
