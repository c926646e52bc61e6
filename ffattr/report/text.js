/* The running text: what a row reads and who reads a column, and the line that says so of one cell. */

const PANES = {
  reads: { axis: columnsAxis, kept: () => state.row, over: () => hover.row },
  feeds: { axis: rowsAxis, kept: () => state.column, over: () => hover.column },
};
const TOP = 5;
const LONGEST = 80; /* characters of a token in lines and lists */
const TEXT_DECADES = 2;
const touched = matchMedia("(hover: none)"); /* a phone: no pointer to hover, no keys */

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/* A token may be a page long; all of it is in its title. */
function cut(text) {
  const characters = Array.from(text.slice(0, 4 * LONGEST));
  return characters.length > LONGEST ? `${characters.slice(0, LONGEST - 1).join("")}…` : text;
}

function named(of, place) {
  const token = element("b", cut(of.labels[place]), "token");
  token.title = `token ${of.tokens[place]}`;
  return [token, element("span", of.positions[place], "position")];
}

/* The tokens of an axis as text, each in an element of its own. */
function wordsOf(of) {
  return of.texts.flatMap((text, place) => {
    /* Space before a word is not shaded; a token that is nothing but space is seen by its sign, before a line end. */
    const [, space, rest] = /^(\s*)([^]*)$/.exec(text);
    const word = element("span", rest || of.labels[place], "word");
    word.dataset.place = place;
    word.title = `token ${of.tokens[place]} at ${of.positions[place]}`;
    return rest ? [place ? space : "", word] : [word, space];
  });
}

function writeText() {
  for (const [name, { axis: axisOf }] of Object.entries(PANES)) {
    const of = axisOf();
    byId(name).style.setProperty("--rows", Math.min(of.tokens.length, TOP));
    byId(name).querySelector(".words").replaceChildren(...wordsOf(of));
  }
}

/* Of the active row or column: the value of every token of the pane. */
function valuesOf(name, active) {
  const count = PANES[name].axis().tokens.length;
  const value = name === "reads" ? (place) => shown.value(active, place) : (place) => shown.value(place, active);
  return Float64Array.from({ length: count }, (_, place) => value(place));
}

function shade() {
  if (!shown) return;
  for (const [name, pane] of Object.entries(PANES)) {
    const article = byId(name);
    const active = pane.kept() !== NONE ? pane.kept() : state.row === NONE && state.column === NONE ? pane.over() : NONE;
    const words = article.querySelectorAll(".word");
    const own = name === "reads" ? rowsAxis() : columnsAxis();
    writeTitle(article.querySelector("h3"), name, own, active);
    article.classList.toggle("empty", active === NONE);
    if (active === NONE) {
      for (const word of words) word.style.removeProperty("--t");
      for (const word of article.querySelectorAll(".own, .other")) word.classList.remove("own", "other");
      article.querySelector(".top").replaceChildren();
      continue;
    }
    const values = valuesOf(name, active);
    const most = values.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
    const strength = (value) => {
      if (!value || !most) return 0;
      const part = Math.abs(value) / most;
      return state.scale === "linear" ? part : clamp(1 + Math.log10(part) / TEXT_DECADES, 0, 1);
    };
    const self = name === "reads" ? columnOfRow(active) : rowOfColumn(active);
    const other = name === "reads" ? state.column : state.row;
    words.forEach((word, place) => {
      word.style.setProperty("--t", strength(values[place]).toFixed(4));
      word.classList.toggle("less", values[place] < 0);
      word.classList.toggle("own", place === self);
      word.classList.toggle("other", place === other && place !== self);
    });
    writeTop(article.querySelector(".top"), name, active, values, most);
    if (pane.kept() !== NONE && self !== NONE) bringIntoSight(article.querySelector(".words"), words[self]);
  }
}

/* Scrolls the text, never the page. */
function bringIntoSight(box, word) {
  const [outer, inner] = [box.getBoundingClientRect(), word.getBoundingClientRect()];
  if (inner.top < outer.top || inner.bottom > outer.bottom) {
    box.scrollTop += inner.top - outer.top - outer.height / 2 + inner.height / 2;
  }
}

function writeTitle(title, name, of, active) {
  if (panel().signed) {
    const token = active === NONE ? ["a token"] : named(of, active);
    title.replaceChildren(name === "reads" ? "What passes to " : "Where it passes from ", ...token);
  } else if (active === NONE) {
    title.replaceChildren(name === "reads" ? "What a token reads" : "Where a token is read");
  } else if (name === "reads") {
    title.replaceChildren("What ", ...named(of, active), " reads");
  } else {
    title.replaceChildren("Where ", ...named(of, active), " is read");
  }
}

function writeTop(list, name, active, values, most) {
  const of = PANES[name].axis();
  const order = Array.from(values.keys()).filter((place) => values[place] !== 0);
  order.sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]) || a - b);
  const focused = Array.from(list.children).findIndex((item) => item.contains(document.activeElement));
  list.replaceChildren(...order.slice(0, TOP).map((place) => {
    const [row, column] = name === "reads" ? [active, place] : [place, active];
    const item = element("li");
    item.dataset.place = place;
    const button = element("button", undefined, "pick");
    button.type = "button";
    button.append(...named(of, place));
    const bar = element("span", undefined, values[place] < 0 ? "length less" : "length");
    bar.style.setProperty("--part", Math.abs(values[place]) / most);
    const value = shown.say(values[place]);
    const aside = shown.both ? "" : shown.shares ? written(shown.norm(row, column)) : percent(shown.share(row, column));
    item.append(button, bar, element("span", value, "value"), element("span", aside, "aside"));
    return item;
  }));
  if (focused !== NONE) list.children[Math.min(focused, list.children.length - 1)]?.querySelector("button").focus();
}

/* The line below the map, which is also what a screen reader says. */
function readOut() {
  const line = byId("readout");
  const pointed = hover.row !== NONE && hover.column !== NONE;
  const { row, column } = pointed ? hover : state;
  line.dataset.row = row === NONE ? "" : rowsAxis().positions[row];
  line.dataset.column = column === NONE ? "" : columnsAxis().positions[column];
  if (!shown || row === NONE || column === NONE) {
    line.dataset.value = "";
    const hint = touched.matches ? "Tap a cell, or a word of the text." : "Point at a cell for its value; click it, or a word of the text, to keep it.";
    line.replaceChildren(element("span", hint, "soft"));
    return;
  }
  const exact = (of, place) => (of.tokens[place] === of.labels[place] ? [] : [element("code", cut(of.tokens[place]))]);
  const facts = shown.signed
    ? signedFacts(row, column)
    : shown.both
    ? [
        element("span", `${percent(shown.share(row, column))} of its row here`),
        element("span", `${percent(shown.otherShare(row, column))} in ${scopeName(state.versus)}`),
        element("strong", signed(shown.value(row, column))),
      ]
    : [
        element("strong", `${DATA.measure} ${written(shown.norm(row, column))}`),
        element("span", `${percent(shown.share(row, column))} of its row`),
      ];
  line.dataset.value = shown.value(row, column);
  const [query, key] = [rowsAxis(), columnsAxis()];
  const pair = element("span", undefined, "pair");
  const verb = shown.signed ? " takes from " : " reads ";
  pair.append(...named(query, row), ...exact(query, row), verb, ...named(key, column), ...exact(key, column));
  line.replaceChildren(pair, ...facts);
}

function signedFacts(row, column) {
  const value = element("strong", withSign(shown.value(row, column)));
  if (!shown.other) return [value];
  const each = [[scopeName(), shown.norm(row, column)], [scopeName(state.versus), shown.otherNorm(row, column)]];
  return [...each.map(([name, of]) => element("span", `${withSign(of)} to “${name}”`)), value];
}

function watchText() {
  for (const [name, pane] of Object.entries(PANES)) {
    const article = byId(name);
    const words = article.querySelector(".words");
    const cellOf = (place) => (name === "reads" ? { row: NONE, column: place } : { row: place, column: NONE });
    const placeOf = (event) => {
      const found = event.target.closest("[data-place]");
      return found ? Number(found.dataset.place) : NONE;
    };
    article.addEventListener("click", (event) => {
      const place = placeOf(event);
      if (place !== NONE) select(cellOf(place));
    });
    words.addEventListener("pointerover", (event) => {
      const place = placeOf(event);
      if (place === NONE) return;
      const active = pane.kept();
      point(name === "reads" ? { row: active, column: place } : { row: place, column: active });
    });
    words.addEventListener("pointerleave", () => point({ row: NONE, column: NONE }));
    words.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      const count = pane.axis().tokens.length;
      const now = name === "reads" ? state.column : state.row;
      const place = now === NONE ? 0 : clamp(now + step, 0, count - 1);
      select(cellOf(place));
      bringIntoSight(words, words.querySelector(`[data-place="${place}"]`));
    });
  }
}
