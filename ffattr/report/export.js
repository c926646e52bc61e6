/* What is in sight of the map, as a file: its pixels, its shapes, or its numbers. */

const MOST_SHAPES = 40_000; /* cells that are shapes of their own; more are one picture */
const LEGEND = { bar: 10, room: 44, title: 30 };

function save(name, blob) {
  const link = element("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${`${DATA.title} ${byId("map-title").textContent}`.replace(/[^\p{L}\p{N}_]+/gu, "-").slice(0, 80)}.${name}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
const escaped = (text) => String(text).replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`).replace(/[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]|[\ud800-\udfff]/gu, "\ufffd");

function saveNumbers() {
  const { row, rowEnd, column, columnEnd } = inSight();
  const [queries, keys] = [rowsAxis(), columnsAxis()];
  const lines = [["query", "key", "query_token", "key_token", "value"].join()];
  for (let i = row; i < rowEnd; i++) {
    for (let j = column; j < columnEnd; j++) {
      const names = [queries.tokens[i], keys.tokens[j]].map(quoted);
      lines.push([queries.positions[i], keys.positions[j], ...names, shown.value(i, j)].join());
    }
  }
  save("csv", new Blob([`${lines.join("\n")}\n`], { type: "text/csv" }));
}

/* Title, map and scale on one canvas, as large as they are on this screen. */
function savePixels() {
  const { map } = canvases;
  const ratio = map.width / map.clientWidth;
  const canvas = element("canvas");
  canvas.width = map.width;
  canvas.height = map.height + (LEGEND.title + LEGEND.room) * ratio;
  const pen = canvas.getContext("2d");
  pen.fillStyle = css("--card");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(map, 0, LEGEND.title * ratio);
  pen.scale(ratio, ratio);
  pen.fillStyle = css("--ink");
  pen.font = `600 14px ${css("--sans")}`;
  pen.fillText(byId("map-title").textContent, 8, 20, map.clientWidth - 16);
  const top = LEGEND.title + map.clientHeight + 6;
  const wide = Math.min(260, map.clientWidth - 16);
  pen.drawImage(byId("bar"), 8, top, wide, LEGEND.bar);
  pen.font = `11px ${css("--sans")}`;
  legendTexts().forEach(({ text, part, line }) => {
    pen.textAlign = ["left", "center", "right"][part * 2];
    pen.fillText(text, 8 + part * wide, top + LEGEND.bar + 12 + 13 * line);
  });
  canvas.toBlob((blob) => save("png", blob));
}

function legendTexts() {
  return ["ticks", "unit"].flatMap((name, line) => {
    const texts = Array.from(byId(name).children, (one) => one.textContent);
    return texts.map((text, place) => ({ text, line, part: texts.length === 1 ? 0.5 : place / (texts.length - 1) }));
  });
}

function saveShapes() {
  const [width, height] = [canvases.map.clientWidth, canvases.map.clientHeight + LEGEND.title + LEGEND.room];
  const part = inSight();
  const { row, rowEnd, column, columnEnd, right, bottom } = part;
  const round = (value) => Number(value.toFixed(2));
  const shapes = [];
  const add = (text) => shapes.push(text);
  const write = (text, x, y, size, anchor = "start", more = "") =>
    add(`<text x="${round(x)}" y="${round(y)}" font-size="${size}" text-anchor="${anchor}" fill="${css("--ink")}"${more}>${escaped(text)}</text>`);
  add(`<rect width="${width}" height="${height}" fill="${css("--card")}"/>`);
  write(byId("map-title").textContent, 8, 20, 14, "start", ' font-weight="600"');
  add(`<g transform="translate(0 ${LEGEND.title})"><clipPath id="c"><rect x="${view.left}" y="${view.top}" width="${round(right - view.left)}" height="${round(bottom - view.top)}"/></clipPath><g clip-path="url(#c)">`);
  if ((rowEnd - row) * (columnEnd - column) <= MOST_SHAPES) {
    for (let i = row; i < rowEnd; i++) {
      for (let j = column; j < columnEnd; j++) {
        add(`<rect x="${round(toX(j))}" y="${round(toY(i))}" width="${round(view.sx)}" height="${round(view.sy)}" fill="${picture.colours.css[picture.level(i, j)]}"/>`);
      }
    }
  } else {
    add(`<image width="${canvases.map.clientWidth}" height="${canvases.map.clientHeight}" href="${canvases.map.toDataURL()}"/>`);
  }
  add("</g>");
  for (let i = row; view.sy >= LABEL && i < rowEnd; i++) write(rowsAxis().labels[i].slice(0, 40), view.left - 6, toY(i + 0.5) + 4, 11, "end");
  for (let j = column; view.sx >= LABEL && j < columnEnd; j++) {
    const [x, y] = [round(toX(j + 0.5) + 4), view.top - 6];
    write(columnsAxis().labels[j].slice(0, 40), x, y, 11, "start", ` transform="rotate(-90 ${x} ${y})"`);
  }
  add("</g>");
  const [top, wide] = [height - LEGEND.room + 6, Math.min(260, width - 16)];
  const stops = picture.colours.css.filter((_, place) => place % 16 === 1);
  stops.forEach((colour, place) => add(`<rect x="${round(8 + (place * wide) / stops.length)}" y="${top}" width="${round(wide / stops.length + 0.3)}" height="${LEGEND.bar}" fill="${colour}"/>`));
  legendTexts().forEach(({ text, part: at, line }) => write(text, 8 + at * wide, top + LEGEND.bar + 12 + 13 * line, 11, ["start", "middle", "end"][at * 2]));
  save("svg", new Blob([`<svg xmlns="${byId("chart").namespaceURI}" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" font-family="sans-serif">${shapes.join("\n")}</svg>\n`], { type: "image/svg+xml" }));
}

function watchSaving() {
  for (const [id, act] of [["save-png", savePixels], ["save-svg", saveShapes], ["save-csv", saveNumbers]]) {
    byId(id).addEventListener("click", () => shown && act());
  }
}
