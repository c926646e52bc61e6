/* Pickers, buttons and keys. */

const NUMBERS = ["panel", "layer", "scope", "part", "versus"];
const SETS = ["values", "scale", "panes"];

function fill(select, names, chosen) {
  const options = names.map(([value, text]) => new Option(text, value, false, value === chosen));
  select.replaceChildren(...options);
}

const numbered = (names) => names.map((name, place) => [place, String(name)]);

/* Makes the controls show the state. */
function showControls() {
  const { scopes, scores, signed: hasSigns } = panel();
  fill(byId("panel"), numbered(PANELS.map(({ name }) => name)), state.panel);
  byId("panel-field").hidden = PANELS.length < 2;
  fill(byId("layer"), numbered(layerNames()), state.layer);
  byId("layer-name").textContent = scores ? "Input of layer" : "Layer";
  byId("scope-name").textContent = scores ? "Number" : "Scope";
  byId("versus-field").hidden = byId("scale").hidden = !hasMaps();
  byId("values").hidden = hasSigns || !hasMaps();
  byId("layer-down").disabled = state.layer === 0;
  byId("layer-up").disabled = state.layer === layerNames().length - 1;
  const described = scopes.map((name, place) => (inWords(place) ? `${name}: ${inWords(place)}` : name));
  fill(byId("scope"), numbered(described), state.scope);
  const others = numbered(described).filter(([place]) => place !== state.scope);
  fill(byId("versus"), [[NONE, "nothing"], ...others], state.versus);
  byId("versus").disabled = !others.length;
  const names = partsOf().length ? partsOf() : comparing() ? partsOf(state.versus) : [];
  byId("part-field").hidden = !names.length;
  if (names.length) {
    const common = /^(\D*?)\s*\d+$/.exec(names[0])?.[1];
    const every = common && names.every((name) => name.startsWith(common));
    byId("part-name").textContent = every ? common[0].toUpperCase() + common.slice(1) : "Part";
    fill(byId("part"), numbered(every ? names.map((name) => name.slice(common.length).trim()) : names), state.part);
  }
  for (const set of SETS) {
    for (const input of document.getElementsByName(set)) input.checked = input.value === state[set];
  }
  byId("values").disabled = comparing();
  byId("values").title = comparing() ? "Differences are of shares of rows" : "";
  if (comparing()) for (const input of document.getElementsByName("values")) input.checked = input.value === "share";
  byId("text-panes").dataset.panes = state.panes;
  byId("theme").setAttribute("aria-pressed", String(currentTheme() === "dark"));
}

const cycle = (value, by, count, least = 0) => least + ((value - least + by + (count - least)) % (count - least));

function turnTheme() {
  change({ theme: currentTheme() === "dark" ? "light" : "dark" });
}

/* Shows what the feed-forward block added, or where no scopes tell that, what lies between two scopes. */
function compareOrNot() {
  if (comparing()) return change({ versus: NONE });
  const { scopes } = panel();
  const added = ffDifference(panel());
  if (added) return change(added);
  return scopes.length > 1 ? change({ versus: state.scope ? state.scope - 1 : 1 }) : undefined;
}

function step(row, column) {
  if (!hasMaps()) return stepScores(row, column);
  const start = state.row === NONE && state.column === NONE;
  const next = start
    ? { row: 0, column: 0 }
    : {
        row: clamp(Math.max(state.row, 0) + row, 0, rows() - 1),
        column: clamp(Math.max(state.column, 0) + column, 0, columns() - 1),
      };
  Object.assign(hover, { row: NONE, column: NONE });
  change(next);
  return reveal(next.row, next.column);
}

const KEYS = {
  "[": () => change({ layer: state.layer - 1 }),
  "]": () => change({ layer: state.layer + 1 }),
  s: () => change({ scope: cycle(state.scope, 1, panel().scopes.length) }),
  S: () => change({ scope: cycle(state.scope, -1, panel().scopes.length) }),
  h: () => change({ part: cycle(state.part, 1, Math.max(partsOf().length, 1)) }),
  H: () => change({ part: cycle(state.part, -1, Math.max(partsOf().length, 1)) }),
  c: compareOrNot,
  d: turnTheme,
  0: () => showAll(),
  "+": () => zoom(1.4),
  "=": () => zoom(1.4),
  "-": () => zoom(1 / 1.4),
  "?": () => byId("help").showModal(),
  Escape: () => change({ row: NONE, column: NONE }),
  ArrowLeft: () => step(0, -1),
  ArrowRight: () => step(0, 1),
  ArrowUp: () => step(-1, 0),
  ArrowDown: () => step(1, 0),
};

function watchControls() {
  for (const name of NUMBERS) {
    byId(name).addEventListener("change", (event) => {
      const place = Number(event.target.value);
      change(name === "panel" ? { panel: place, row: NONE, column: NONE } : { [name]: place });
    });
  }
  for (const set of SETS) {
    for (const input of document.getElementsByName(set)) {
      input.addEventListener("change", () => change({ [set]: input.value }));
    }
  }
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("layer-down").addEventListener("click", KEYS["["]);
  byId("layer-up").addEventListener("click", KEYS["]"]);
  byId("theme").addEventListener("click", turnTheme);
  byId("fit").addEventListener("click", showAll);
  byId("help-open").addEventListener("click", KEYS["?"]);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open || !KEYS[event.key]) return;
    /* Pickers use arrows and letters themselves. */
    if (event.target.matches?.("select, input") && event.key !== "Escape" && event.key !== "?") return;
    const arrow = event.key.startsWith("Arrow");
    if (arrow && event.target !== document.body && event.target !== canvases.over) return;
    event.preventDefault();
    KEYS[event.key]();
  });
}
